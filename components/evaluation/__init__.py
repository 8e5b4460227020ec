"""Recall per task with intervals, and the gate."""
