"""Decides by ECHO: sparse gates, a planned budget and batch-wide scheduling (arXiv 2604.09603)."""
