"""Variants of a configuration, trained the same way and compared on validation."""
