"""Bridges into other serving engines."""
