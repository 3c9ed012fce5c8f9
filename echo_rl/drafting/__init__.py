"""Training of EAGLE-3 drafters: self-generated conversations, cached target features, unrolled training.

``synthesize`` writes conversations, ``cache_features`` what the target computes on them, ``train`` a drafter folder.
"""
