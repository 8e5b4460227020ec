"""Studies of finished runs."""
