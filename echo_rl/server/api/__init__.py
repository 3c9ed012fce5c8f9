"""The HTTP API: routes, the bodies that clients may send, the answers, access, limits and metrics."""
