"""Arrow schemas of every table that travels between stages."""
