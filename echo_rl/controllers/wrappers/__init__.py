"""Wraps controllers in other controllers."""
