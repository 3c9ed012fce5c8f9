"""Trains EAGLE-3 drafters: self-generated conversations, cached target features, unrolled training.

``synthesize`` writes conversations, ``cache_features`` the target's features of them, ``train`` a drafter folder.
"""
