"""A real ``echo-rl serve`` process: its outputs, its overhead, controllers through HTTP, and its picture."""
