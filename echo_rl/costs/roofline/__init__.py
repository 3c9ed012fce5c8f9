"""Models cost profiles of GPUs that nobody measured here: published peaks, model sizes and stated assumptions.

Everything that comes out of this package is labelled as modelled; `CostProfile.modelled` keeps the label in the file.
"""
