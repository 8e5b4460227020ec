"""HTTP endpoints of a supervisor: /healthz, /readyz and /metrics."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from components.exceptions import UnavailableError
from components.recall.process.supervisor import State

STALE_SECONDS = 10.0  # a supervisor that has not turned for so long is not alive


class InstanceCollector(Collector):
    """The instances as Prometheus reads them."""

    def __init__(self, read: Callable[[], State]) -> None:
        self._read = read

    def collect(self) -> Iterator[Metric]:
        """The current metrics."""
        instances = self._read().instances
        serving = GaugeMetricFamily("urm_instance_serving", "1: the instance serves a release.", labels=["instance"])
        restarts = CounterMetricFamily("urm_instance_restarts", "Processes after the first.", labels=["instance"])
        for instance in instances:
            name = [str(instance.instance)]
            serving.add_metric(name, float(bool(instance.release)))
            restarts.add_metric(name, float(instance.restarts))
        yield serving
        yield restarts


def serve_health(read: Callable[[], State], host: str, port: int) -> ThreadingHTTPServer:
    """Serve in a thread until the process ends.

    Args:
        read: Returns the current state.
        host: Address to listen on.
        port: Port to listen on.

    Raises:
        UnavailableError: The port is taken.
    """
    registry = CollectorRegistry()
    registry.register(InstanceCollector(read))

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = read()
            alive = time.monotonic() - state.turned_at < STALE_SECONDS
            if self.path == "/metrics":
                self._answer(200, generate_latest(registry), CONTENT_TYPE_LATEST)
            elif self.path in ("/healthz", "/readyz"):
                good = alive and (state.ready or self.path == "/healthz")
                body = {
                    "status": "ok" if good else "unavailable",
                    "instances": [asdict(one) for one in state.instances],
                }
                self._answer(200 if good else 503, json.dumps(body).encode(), "application/json")
            else:
                self._answer(404, b"expected /healthz, /readyz or /metrics\n", "text/plain")

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # probes come every few seconds
            pass

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except OSError as error:
        raise UnavailableError(
            f"health of the instances on {host}:{port}",
            expected="a free port",
            got=error.strerror,
            remedy="choose another --port",
        ) from error
    Thread(target=server.serve_forever, daemon=True).start()
    return server
