"""Runs a TrainJob of Kubeflow Trainer v2 as an Airflow task. Nothing here knows of recommendation models.

`TrainJobOperator` submits a TrainJob, waits for it without a worker, streams the log of its first node and says why it
failed. What it promises, and what the triggerer needs, is in its docstring. `cluster` has its requests; `job` and
`logs` are plain functions over what the API server answers.
"""
