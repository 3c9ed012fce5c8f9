"""Measures the engine by itself: throughput, acceptance, losslessness, plain decoding, parity of its steps."""
