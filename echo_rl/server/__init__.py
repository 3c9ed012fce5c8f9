"""The server: an OpenAI-compatible front over an engine in a process of its own, with hot-swappable controllers."""
