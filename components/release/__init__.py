"""The bundle, its registration and its promotion."""
