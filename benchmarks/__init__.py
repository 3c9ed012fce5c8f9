"""The measurements behind every number of the documentation: each script writes one JSON result.

Run one from the repository's root as ``python -m benchmarks.engine.throughput``; ``--quick`` takes a look."""
