"""Learned controllers: their training, and how much a controller can gain at most."""
