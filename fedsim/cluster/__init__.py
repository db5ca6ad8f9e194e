"""Ray: the only package that knows it. Workers on actors, and the cluster that they are on."""
