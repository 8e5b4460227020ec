"""Load benchmark of the recall runtime, with real processes: `python -m benchmarks.serving --help`."""
