"""The guard around controllers: validation, deadlines, fallbacks and dry runs."""
