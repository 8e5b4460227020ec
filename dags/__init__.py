"""Pipelines of Airflow: wiring only, one per file."""
