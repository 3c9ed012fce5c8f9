"""Loads a backend and records its results: arrivals, datasets, the driver, records and metrics."""
