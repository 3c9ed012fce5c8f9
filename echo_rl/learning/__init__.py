"""Trains policies: demonstrations, cloning, PPO, callbacks, export. Put together by `train`."""
