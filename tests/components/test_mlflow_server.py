import http.server
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from mlflow.server.fastapi_security import HostValidationMiddleware
from starlette.applications import Starlette

from components import mlflow_server
from components.exceptions import ConfigError, UnavailableError
from components.mlflow_server import require_server
from components.settings import Settings
from tests.worlds.servers import free_port, serve_application


def test_a_server_that_is_down_is_said_at_once() -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    clock = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"MLflow at {uri}: expected an answer, got .*; start it with `urm up`"):
        require_server(uri)
    assert time.monotonic() - clock < 10


def test_credentials_of_the_server_are_not_shown() -> None:
    uri = f"http://trainer:s3cr3t@127.0.0.1:{free_port()}"
    with pytest.raises(UnavailableError, match=r"MLflow at http://127\.0\.0\.1:\d+: ") as raised:
        require_server(uri)
    assert "s3cr3t" not in str(raised.value)
    assert "s3cr3t" not in Settings(mlflow_uri=uri).run_page("3", "f")


def test_a_silent_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server, "_PROBE_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UnavailableError, match="expected an answer, got timed out"):
            require_server(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("status", [200, 401, 403, 404])
def test_any_answer_will_do(status: int) -> None:
    with serve_status(status) as uri:
        require_server(uri)


def test_a_proxy_without_its_server_is_no_answer() -> None:
    with serve_status(503) as uri, pytest.raises(UnavailableError, match="expected an answer, got status 503"):
        require_server(uri)


def test_a_server_that_knows_itself_by_another_name() -> None:
    with serve_application(HostValidationMiddleware(Starlette(), ["mlflow.example:5000"])) as uri:  # MLflow's own check
        with pytest.raises(ConfigError, match=r"by this host name, got status 403, Invalid Host header.*ALLOWED_HOSTS"):
            require_server(uri)
    with serve_application(HostValidationMiddleware(Starlette(), ["127.0.0.1:*"])) as uri:
        require_server(uri)


@pytest.mark.parametrize("uri", ["sqlite:///nowhere/mlflow.db", "/a/folder"])
def test_what_is_no_server_is_not_asked(uri: str) -> None:
    require_server(uri)


def test_an_address_that_is_none() -> None:
    with pytest.raises(UnavailableError, match="MLflow at http://: expected an answer"):
        require_server("http://")


@contextmanager
def serve_status(status: int) -> Iterator[str]:
    """Address of a server that always answers with one status."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
