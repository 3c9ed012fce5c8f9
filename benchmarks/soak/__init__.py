"""A server under everything that goes wrong at once, and what must hold of it afterwards."""
