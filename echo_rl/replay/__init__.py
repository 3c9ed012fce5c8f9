"""Recorded responses and their exact replay: one server at a time or many side by side."""
