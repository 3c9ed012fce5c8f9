"""The costs of a step on one machine: measured profiles, their interpolation and their correction in service."""
