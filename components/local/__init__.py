"""The local services (Airflow, MLflow, Redis, recall) and the demonstration on them."""
