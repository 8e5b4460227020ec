"""The services of one machine: Airflow, MLflow, Redis and the recall runtime as processes, and the demo on top."""
