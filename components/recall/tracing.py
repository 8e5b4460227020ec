"""OpenTelemetry traces of the runtime: nothing, unless OTEL_EXPORTER_OTLP_ENDPOINT says where they go."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from components.exceptions import ConfigError
from components.settings import Settings

_NOTHING = nullcontext()
_NO_PARENT = nullcontext("")


class Tracing:
    """No traces; the spans of `otel.OtelTracing` are its shape."""

    def dependencies(self) -> list[Any]:
        """Dependencies of a route that goes on with its caller's trace."""
        return []

    def accept(self, num_events: int) -> AbstractContextManager[str]:
        """Span around the acceptance of events; gives the traceparent that their entries carry, or nothing."""
        return _NO_PARENT

    def batch(self, traceparents: Sequence[str], *, batch: str, release: str) -> AbstractContextManager[None]:
        """Span around a worker's batch, and one in the trace of each event that has one."""
        return _NOTHING

    def part(self, name: str) -> AbstractContextManager[None]:
        """Span around a part of a batch."""
        return _NOTHING


def open_tracing(settings: Settings, service: str) -> Tracing:
    """Traces as the environment asks for them.

    Args:
        settings: Where spans go.
        service: Name of the process, unless OTEL_SERVICE_NAME gives it another.

    Raises:
        ConfigError: The libraries are not installed.
    """
    if not settings.otlp_endpoint:
        return Tracing()
    try:
        from components.recall.otel import export_spans
    except ImportError as error:
        raise ConfigError(
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            expected="the OpenTelemetry SDK and its exporter",
            got=error,
            remedy="install the extra `otel`, or unset the variable",
        ) from error
    return export_spans(service)
