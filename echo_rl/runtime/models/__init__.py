"""Loads target models and the formats that their folders come in."""
