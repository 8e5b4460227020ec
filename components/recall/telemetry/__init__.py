"""Logs, metrics and traces of the runtime."""
