"""The `urm` command."""
