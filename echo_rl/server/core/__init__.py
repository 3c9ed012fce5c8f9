"""The engine process: the loop around the engine, and its controllers."""
