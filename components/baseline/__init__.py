"""Popularity, own history, item-kNN and the target-attention network."""
