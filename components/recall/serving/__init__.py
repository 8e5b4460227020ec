"""A release opened for use."""
