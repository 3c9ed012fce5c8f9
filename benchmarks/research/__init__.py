"""Replays: how well they stand for the live loop, every controller on them, and GPUs that were modelled."""
