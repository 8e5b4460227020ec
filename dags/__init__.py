"""Airflow DAGs: wiring only, one a file."""
