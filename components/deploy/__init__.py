"""Promotion: the roll-out of a release, and its way back."""
