"""Frozen content vectors and the memory-mapped item table."""
