"""What the engine does by itself: throughput, acceptance, losslessness, plain decoding, parity of its steps."""
