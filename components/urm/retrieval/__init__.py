"""Top-K of the catalogue for user vectors."""
