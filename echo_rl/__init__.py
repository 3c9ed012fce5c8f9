"""ECHO-RL: speculative decoding under one batch-wide node budget, with the budget decision as a policy."""

__version__ = "0.1.0"
