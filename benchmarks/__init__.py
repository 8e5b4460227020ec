"""Measurements behind docs/results/; `python -m benchmarks.results` runs them all."""
