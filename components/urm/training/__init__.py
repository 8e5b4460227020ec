"""Training: steps, loss, schedule, validation."""
