import base64
import http.server
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import mlflow
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST, UNAUTHENTICATED
from mlflow.server.fastapi_security import HostValidationMiddleware
from mlflow.tracking._tracking_service.utils import get_default_host_creds
from mlflow.utils.rest_utils import http_request
from requests import ConnectionError as RequestsConnectionError
from sqlalchemy.exc import OperationalError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from components import mlflow_server
from components.exceptions import ConfigError, UnavailableError
from components.mlflow_server import brief_requests, mlflow_errors, open_server, require_server
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


def test_an_open_server_is_told_who_asks_and_mlflow_shows_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"):
        monkeypatch.setenv(variable, "")
    before, asked = mlflow.get_tracking_uri(), []

    async def refuse(request: Request) -> Response:
        asked.append(request.headers["authorization"])
        return Response("no", status_code=403)

    with serve_application(Starlette(routes=[Route("/{path:path}", refuse, methods=["GET", "POST"])])) as uri:
        address = uri.replace("://", "://trainer:s3%2Fcr3t@")
        try:
            open_server(address)
            with pytest.raises(ConfigError, match=r"expected that it lets this user .*, got .* 403") as refused:
                with mlflow_errors(address):
                    mlflow.MlflowClient().search_experiments()
            assert mlflow.get_tracking_uri() == uri
        finally:
            mlflow.set_tracking_uri(before)
    assert {base64.b64decode(header.removeprefix("Basic ")) for header in asked} == {b"trainer:s3/cr3t"}
    assert len(asked) == 2
    assert "cr3t" not in str(refused.value) + str(refused.value.__cause__)


@pytest.mark.parametrize("uri", ["postgresql://trainer:s3cr3t@db/mlflow", "sqlite:///mlflow.db"])
def test_an_open_database_keeps_its_address(uri: str) -> None:
    before = mlflow.get_tracking_uri()
    try:
        open_server(uri)
        assert mlflow.get_tracking_uri() == uri
    finally:
        mlflow.set_tracking_uri(before)


def test_what_a_server_answers_is_no_outage() -> None:
    uri = "http://trainer:s3cr3t@mlflow:5000"
    for error in (
        MlflowException("status 503"),
        RequestsConnectionError("refused"),
        OperationalError("no", {}, Exception()),
    ):
        with (
            pytest.raises(UnavailableError, match="MLflow at http://mlflow:5000: expected an answer"),
            mlflow_errors(uri),
        ):
            raise error
    with pytest.raises(MlflowException, match="no such name"), mlflow_errors(uri):
        raise MlflowException("no such name", RESOURCE_DOES_NOT_EXIST)
    with pytest.raises(ConfigError, match=r"lets this user .*, got status 401"), mlflow_errors(uri):
        raise MlflowException("status 401", UNAUTHENTICATED)


def test_a_silent_server_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_server, "_PROBE_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(UnavailableError, match=r"expected an answer, got .*timed out"):
            require_server(f"http://127.0.0.1:{silent.getsockname()[1]}")


@pytest.mark.parametrize("fault", ["status 503", "silence"])
def test_a_brief_request_does_not_wait_for_a_server_that_is_away(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    with serve_status(503) as answering, socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        uri = answering if fault == "status 503" else f"http://127.0.0.1:{silent.getsockname()[1]}"
        clock = time.monotonic()
        with pytest.raises(MlflowException), brief_requests():
            http_request(get_default_host_creds(uri), "/", "GET")
        assert time.monotonic() - clock < 60  # the first request loads MLflow's plugins
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "30"
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ


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


@pytest.mark.parametrize(
    ("variable", "trusts"),
    [
        ("REQUESTS_CA_BUNDLE", True),
        ("MLFLOW_TRACKING_SERVER_CERT_PATH", True),
        ("SSL_CERT_FILE", False),  # MLflow's client does not know it
    ],
)
def test_a_certificate_is_trusted_as_by_mlflows_client(
    variable: str, trusts: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = make_certificate(tmp_path)
    with serve_status(200, certificate) as uri:
        with pytest.raises(UnavailableError, match=r"expected an answer, got .*certificate verify failed"):
            require_server(uri)
        monkeypatch.setenv(variable, str(certificate))
        creds = get_default_host_creds(uri)
        if trusts:
            require_server(uri)
            assert http_request(creds, "/", "GET", max_retries=0).status_code == 200
        else:
            with pytest.raises(UnavailableError, match="certificate verify failed"):
                require_server(uri)
            with pytest.raises(MlflowException, match="certificate verify failed"):
                http_request(creds, "/", "GET", max_retries=0)


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_certificate_need_not_be_trusted_where_mlflows_client_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_status(200, make_certificate(tmp_path)) as uri:
        monkeypatch.setenv("MLFLOW_TRACKING_INSECURE_TLS", "true")
        require_server(uri)


def make_certificate(folder: Path) -> Path:
    """Key and certificate of 127.0.0.1 in one file, signed by itself."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    form = (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = folder / "server.pem"
    path.write_bytes(key.private_bytes(*form) + certificate.public_bytes(Encoding.PEM))
    return path


@contextmanager
def serve_status(status: int, certificate: Path | None = None) -> Iterator[str]:
    """Address of a server that always answers with one status; by TLS with this key and certificate."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        if certificate is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"{'http' if certificate is None else 'https'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
