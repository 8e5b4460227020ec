"""Raw logs to the two canonical tables."""
