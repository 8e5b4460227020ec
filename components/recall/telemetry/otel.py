"""Spans of API and worker. An event's trace begins where it is accepted and ends where its result is visible.

    accept ── visible (links to the batch)      one trace an event, or the caller's own; the entry carries its context
    batch ─┬─ history                           a trace of its own, since many events share it; links to each event
           ├─ inference
           └─ store

Spans carry no user, no query and no message of an error. The SDK reads everything else (sampling, headers, time-outs)
from the standard OTEL_* variables.
"""

# No `from __future__ import annotations`: FastAPI must see the type of a dependency's argument.
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import Depends, Request
from opentelemetry import context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Link, Span, SpanKind, Status, StatusCode, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from components import __version__
from components.recall.telemetry.tracing import Tracing

_PROPAGATOR = TraceContextTextMapPropagator()


def export_spans(service: str) -> Tracing:
    """Spans that go to OTEL_EXPORTER_OTLP_ENDPOINT over HTTP, in the background; the rest at the exit."""
    resource = Resource({SERVICE_NAME: service}).merge(OTELResourceDetector().detect())
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return OtelTracing(provider)


class OtelTracing(Tracing):
    """Spans by a provider of the SDK."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("urm.recall", __version__)

    def close(self) -> None:
        """See Tracing."""
        self._provider.shutdown()

    def dependencies(self) -> list[Any]:
        """See Tracing."""
        return [Depends(_follow)]

    @contextmanager
    def accept(self, num_events: int) -> Iterator[str]:
        """See Tracing."""
        with self._span("accept", kind=SpanKind.PRODUCER, attributes={"urm.events": num_events}):
            carrier: dict[str, str] = {}
            _PROPAGATOR.inject(carrier)
            yield carrier.get("traceparent", "")

    @contextmanager
    def batch(self, traceparents: Sequence[str], *, batch: str, release: str) -> Iterator[None]:
        """See Tracing."""
        started = time.time_ns()
        attributes = {"urm.batch": batch, "urm.release": release}
        parents = [_PROPAGATOR.extract({"traceparent": one}) for one in dict.fromkeys(traceparents) if one]
        links = [Link(get_current_span(parent).get_span_context()) for parent in parents]
        counted = {**attributes, "urm.events": len(traceparents)}
        with self._span("batch", context=context.Context(), kind=SpanKind.CONSUMER, links=links, attributes=counted):
            yield
            link = Link(get_current_span().get_span_context())
        for parent in parents:
            self._tracer.start_span(
                "visible", parent, SpanKind.CONSUMER, attributes, links=[link], start_time=started
            ).end()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """See Tracing."""
        with self._span(name):
            yield

    @contextmanager
    def _span(self, name: str, **options: Any) -> Iterator[Span]:
        """A span that is the current one; of an error it has the type alone, since messages may quote an event."""
        with self._tracer.start_as_current_span(
            name, record_exception=False, set_status_on_exception=False, **options
        ) as span:
            try:
                yield span
            except Exception as error:
                span.set_status(Status(StatusCode.ERROR, type(error).__name__))
                raise


async def _follow(request: Request) -> None:
    """Go on with the caller's trace for the rest of this request."""
    context.attach(_PROPAGATOR.extract(dict(request.headers)))
