"""The stages of the GPU validation, what runs them, and what they leave for its report."""
