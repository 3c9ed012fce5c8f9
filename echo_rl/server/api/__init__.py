"""The HTTP front: routes, what clients may send, what they are answered."""
