"""Logs of the long-running processes: JSON lines for collectors, colours only where a person watches."""

from __future__ import annotations

import sys

import structlog


def log_as_json() -> None:
    """Log one JSON object a line, unless standard error is a terminal; levels stay as the command line set them."""
    if sys.stderr.isatty():
        return
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    )
