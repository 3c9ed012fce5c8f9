"""The load on a backend and its results: arrivals, datasets, the driver, records and metrics."""
