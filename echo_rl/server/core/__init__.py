"""The engine process: the loop around the engine and who decides in it."""
