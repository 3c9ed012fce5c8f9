"""Published rivals and fixed plans."""
