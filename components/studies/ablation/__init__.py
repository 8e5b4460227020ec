"""Variants of a configuration, trained alike and compared on validation."""
