"""Serves the runs of an experiment: on a replay or a live engine in this process, or a server over HTTP."""
