"""Holds learned policies: plans from a network, and the network as plain arrays."""
