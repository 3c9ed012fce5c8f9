"""Serves requests: sequences, paged KV, target, drafter, super-tree verification. Knows no controller by name."""
