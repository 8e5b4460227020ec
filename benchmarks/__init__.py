"""Measurements behind docs/results.md; `python -m benchmarks.results` runs them all."""
