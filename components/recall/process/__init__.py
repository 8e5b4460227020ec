"""Processes of the runtime: launch, forks, supervisor, health."""
