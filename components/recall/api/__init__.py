"""The recall API: events in, stored results out."""
