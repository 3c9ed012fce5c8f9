"""The control problem: workloads, rewards, recorded responses and their replay, and the Gymnasium environment."""
