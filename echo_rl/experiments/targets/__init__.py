"""Where the runs of an experiment are served: a replay or a live engine in this process, or a server over HTTP."""
