"""Logs of the long-running processes: JSON lines for collectors, colours only where a person watches.

No line names a user or quotes an event. Messages of exceptions may do so (those of redis-py quote whole commands), so
of an exception a line has the type and the places in the code, never the message.
"""

import logging
import sys
import traceback
from pathlib import Path

import structlog
from structlog.typing import EventDict, ExcInfo, Processor


def log_as_json() -> None:
    """Log one JSON object a line, also what libraries log, unless standard error is a terminal.

    Levels of our own lines stay as the command line set them; libraries speak from `warning` on, uvicorn from `info`.
    """
    if sys.stderr.isatty():
        *before, renderer = structlog.get_config()["processors"]
        structlog.configure(processors=[*before, _escape, renderer])
        return
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.ExceptionRenderer(_places),
    ]
    structlog.configure(processors=[*shared, structlog.processors.JSONRenderer()])
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("uvicorn").setLevel(logging.INFO)
    logging.captureWarnings(True)


def _escape(_: object, __: str, line: EventDict) -> EventDict:
    """Ids are what somebody typed: on a terminal they must not be control sequences."""
    return {
        name: ascii(value)[1:-1] if isinstance(value, str) and not value.isprintable() else value
        for name, value in line.items()
    }


def name_error(error: BaseException) -> str:
    """Type of an exception and where it was raised, without its message."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return type(error).__name__ + place


def _places(exc_info: ExcInfo) -> str:
    """The traceback in one line, outermost call first, without messages."""
    kind, _, trace = exc_info
    frames = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(trace)]
    return " > ".join([*frames, kind.__name__])
