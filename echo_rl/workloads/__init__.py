"""What is asked of a backend and what came of it: arrivals, datasets, the driver, records and metrics."""
