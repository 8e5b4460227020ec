"""Traces: one from the API's acceptance of an event to its visible result, and nothing where nobody asks for them."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import redis
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from components.config import RecallConfig
from components.exceptions import ConfigError
from components.recall.api.app import create_app
from components.recall.process.launch import run_worker
from components.recall.serving.engine import load_release
from components.recall.state.scripts import STREAM
from components.recall.telemetry.otel import OtelTracing
from components.recall.telemetry.setup import open_tracing
from components.recall.telemetry.tracing import Tracing
from components.recall.worker.stream import RecallWorker
from components.redis_client import open_redis
from components.release.publication import WANTED, Publication
from components.settings import Settings
from tests.worlds.recall import Release, make_event, serve_release, wait_until
from tests.worlds.tiny import make_config

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracing(exporter: InMemorySpanExporter) -> Iterator[OtelTracing]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield OtelTracing(provider)
    provider.shutdown()


@pytest.fixture
def http(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig, tracing: OtelTracing
) -> Iterator[TestClient]:
    serve_release(client, releases[0])
    with TestClient(create_app(releases[0].settings, recall_config, tracing)) as connection:
        yield connection


def work_off(client: redis.Redis, release: Release, config: RecallConfig, tracing: Tracing) -> None:
    """Let a worker with traces empty the stream."""
    publication = Publication(release=release.name, bundle=str(release.bundle), order=1)
    client.set(WANTED, publication.model_dump_json())
    worker = RecallWorker(
        open_redis(release.settings.redis_url),
        config,
        lambda wanted: load_release(wanted, release.settings, release.config.release),
        "worker-a",
        tracing,
    )
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_until(lambda: client.xlen(STREAM) == 0)
    finally:
        worker.stop()
        thread.join(timeout=30)


def post(http: TestClient, user: str, **headers: str) -> None:
    event = make_event(user, query="arsenic").model_dump(mode="json")
    assert http.post("/v1/events", json=event, headers=headers).status_code == 202


def by_name(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    spans: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    return spans


def span_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.span_id


def linked(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


def trace_id(span: ReadableSpan) -> int:
    assert span.context is not None
    return span.context.trace_id


def test_spans_of_api_and_worker_share_the_trace_of_the_caller(
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    http: TestClient,
    tracing: OtelTracing,
    exporter: InMemorySpanExporter,
) -> None:
    post(http, "madame-bovary", traceparent=f"00-{CALLER}-00f067aa0ba902b7-01")
    post(http, "emma")
    work_off(client, releases[0], recall_config, tracing)
    spans = by_name(exporter)
    assert {name: len(those) for name, those in spans.items()} == {
        "accept": 2, "batch": 1, "history": 1, "inference": 1, "store": 1, "visible": 2,
    }  # fmt: skip
    accepted, other = spans["accept"]
    assert trace_id(accepted) == int(CALLER, 16) != trace_id(other)
    assert {trace_id(span) for span in spans["visible"]} == {trace_id(accepted), trace_id(other)}
    for span in spans["visible"]:
        (parent,) = [one for one in spans["accept"] if trace_id(one) == trace_id(span)]
        assert span.parent is not None and span.parent.span_id == span_id(parent)
        assert linked(span) == [span_id(spans["batch"][0])]
    (batch,) = spans["batch"]
    assert batch.parent is None
    assert linked(batch) == [span_id(accepted), span_id(other)]
    for part in ("history", "inference", "store"):
        assert trace_id(spans[part][0]) == trace_id(batch)
    assert batch.attributes is not None and batch.attributes["urm.batch"] == "worker-a/1"
    text = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "bovary" not in text and "arsenic" not in text


def test_failing_batch_says_what_kind_of_error_and_not_its_message(
    tracing: OtelTracing, exporter: InMemorySpanExporter
) -> None:
    with pytest.raises(ValueError, match="arsenic"):
        with tracing.batch(["", f"00-{CALLER}-00f067aa0ba902b7-01"], batch="w/1", release="r"), tracing.part("store"):
            raise ValueError("arsenic")
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["store", "batch"]  # nothing became visible
    assert {span.status.description for span in spans} == {"ValueError"}
    assert "arsenic" not in "".join(span.to_json() for span in spans)


def test_without_an_endpoint_nothing_is_loaded_and_entries_carry_nothing(
    client: redis.Redis, api: TestClient, releases: tuple[Release, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert type(open_tracing(Settings(), "api")) is Tracing
    assert Tracing().dependencies() == []
    post(api, "emma", traceparent=f"00-{CALLER}-00f067aa0ba902b7-01")
    ((_, fields),) = client.xrange(STREAM)
    assert set(fields) == {"event", "accepted_at", "version"}
    check = "import sys, components.recall.api.app; sys.exit('components.recall.telemetry.otel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@contextmanager
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """Bodies of what is sent to the endpoint that the environment names."""
    bodies: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
            monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
            yield bodies
        finally:
            server.shutdown()
            thread.join()


def test_a_process_that_ends_has_sent_its_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    with collector(monkeypatch) as bodies:
        program = (
            "from components.recall.telemetry.setup import open_tracing\n"
            "from components.settings import Settings\n"
            "with open_tracing(Settings(), 'urm-recall-api').accept(1) as traceparent: print(traceparent)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("00-")
    assert b"urm-recall-api" in b"".join(bodies) and b"accept" in b"".join(bodies)


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_has_sent_its_spans_before_its_process_ends(
    fails: bool, releases: tuple[Release, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An instance is forked: Python ends it without what is registered for the exit."""

    class Worker:
        loading = False

        def __init__(self, *_: object, tracing: Tracing, **__: object) -> None:
            self.tracing = tracing

        def run(self) -> None:
            with self.tracing.part("last"):
                pass
            if fails:
                raise ConfigError("release", expected="one", got="none", remedy="promote one")

        def stop(self) -> None:
            pass

    monkeypatch.setattr("components.recall.worker.stream.RecallWorker", Worker)
    monkeypatch.setattr("components.recall.process.launch._prepare_model", lambda *_: None)
    monkeypatch.setattr("components.recall.process.launch.on_termination", lambda _: None)
    with collector(monkeypatch) as bodies:
        settings = Settings(redis_url=releases[0].settings.redis_url)
        with pytest.raises(ConfigError) if fails else nullcontext():
            run_worker(settings, make_config(), "127.0.0.1", 0)
        assert b"last" in b"".join(bodies)
