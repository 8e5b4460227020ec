"""Stages of the flow, one module each: read, call, write."""
