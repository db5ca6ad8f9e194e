"""The command line: flags, progress, background runs, results."""
