"""Helpers that every package may use: files replaced whole, stores that are resumed, statistics, plotting."""
