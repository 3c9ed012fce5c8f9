"""Holds the drafters, a file a family, and the loop that grows their trees."""
