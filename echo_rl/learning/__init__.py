"""The pieces of training a policy: demonstrations, cloning, PPO, callbacks, export. Put together by `train`."""
