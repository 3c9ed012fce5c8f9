"""Helps every package: files replaced whole, stores that are resumed, statistics, plotting."""
