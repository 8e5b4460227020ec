"""Behaviour sequences (Feast) and point-in-time task examples."""
