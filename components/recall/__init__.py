"""The asynchronous recall runtime: stream, worker, result store, API."""
