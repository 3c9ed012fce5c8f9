"""Measures what controllers run on: a machine's cost surface (`cost`) and a drafter's gates (`gates`)."""
