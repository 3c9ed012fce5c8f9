"""Holds published rivals and fixed plans."""
