"""Everything that knows Ray, except Ray Tune: the session, the machines, and pools of workers.

pool.py opens a pool; workers.py is its contract. A pool computes in this process (in_process.py) or on Ray actors
(actors.py, calls.py), placed by placement.py on the machines that nodes.py finds. session.py joins a cluster, or starts
a private one (private_cluster.py, private_folder.py), and driver.py runs an experiment in an actor of it.
"""
