"""Controllers compared: arms, workloads and blocks on a replay, the live engine or a server."""
