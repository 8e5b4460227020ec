"""What an operator does: feed events, look at and replay dead letters, trace, show."""
