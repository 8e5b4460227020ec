"""OpenTelemetry traces of the runtime: nothing, unless OTEL_EXPORTER_OTLP_ENDPOINT says where they go."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

_NOTHING = nullcontext()
_NO_PARENT = nullcontext("")


class Tracing:
    """No traces; the spans of `otel.OtelTracing` are its shape."""

    def close(self) -> None:
        """Export what is left; a forked process has no other moment for it."""

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
