"""Whether MLflow's server answers, asked before MLflow's own client does, which tries a dead one for minutes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

import requests

from components.exceptions import ConfigError, UnavailableError
from components.settings import hide_credentials

_PROBE_SECONDS = 5.0
REFUSED = ("PERMISSION_DENIED", "UNAUTHENTICATED")
_ANSWERS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
_BRIEF = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}  # seconds


def require_server(uri: str) -> None:
    """Ask the server for a sign of life; any answer will do but a server's error and a refused host name.

    Whatever is no address of a server (SQLite, a folder) is not asked.

    Raises:
        ConfigError: The server refuses requests by this host name.
        UnavailableError: The tracking server does not answer.
    """
    if not uri.startswith(("http://", "https://")):
        return
    try:
        answer = _get(f"{uri.rstrip('/')}/")
    except requests.RequestException as error:
        cause = error.args[0] if error.args else error
        raise no_answer(uri, getattr(cause, "reason", None) or cause) from error
    if answer.status_code == HTTPStatus.FORBIDDEN and "Host header" in answer.text:
        raise ConfigError(
            f"MLflow at {hide_credentials(uri)}",
            expected="a server that takes requests by this host name",
            got=f"status 403, {answer.text[:80]}",
            remedy="have MLFLOW_SERVER_ALLOWED_HOSTS of that server name host and port of URM_MLFLOW_URI",
        )
    if answer.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR:
        raise no_answer(uri, f"status {answer.status_code}")


def _get(url: str) -> requests.Response:
    """Ask as MLflow's client does, which trusts what its own variables say and, without them, REQUESTS_CA_BUNDLE."""
    from mlflow.environment_variables import (
        MLFLOW_TRACKING_CLIENT_CERT_PATH,
        MLFLOW_TRACKING_INSECURE_TLS,
        MLFLOW_TRACKING_SERVER_CERT_PATH,
    )

    return requests.get(
        url,
        timeout=_PROBE_SECONDS,
        verify=MLFLOW_TRACKING_SERVER_CERT_PATH.get() or not MLFLOW_TRACKING_INSECURE_TLS.get(),  # type: ignore[no-untyped-call]
        cert=MLFLOW_TRACKING_CLIENT_CERT_PATH.get(),  # type: ignore[no-untyped-call]
    )


def open_server(uri: str) -> None:
    """Turn MLflow's client to a server that answers.

    User and password in the address of one become the variables that MLflow has for them: it writes addresses to its
    log and into links.

    Raises:
        ConfigError: The server refuses requests by this host name.
        UnavailableError: It does not answer.
    """
    import mlflow

    require_server(uri)
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https") and parts.username and parts.password:
        os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password)
        uri = hide_credentials(uri)
    mlflow.set_tracking_uri(uri)


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """Turn an outage or a refusal that MLflow's client meets within into one sentence.

    Any other answer of the server stays what it is: a defect of ours, or what another has deleted meanwhile.

    Raises:
        ConfigError: The server lets this user not do it.
        UnavailableError: It does not answer.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, requests.RequestException, SQLAlchemyError) as error:
        code = getattr(error, "error_code", "")
        if code in _ANSWERS:
            raise
        if code not in REFUSED:
            raise no_answer(uri, _first_line(error)) from error
        raise ConfigError(
            f"MLflow at {hide_credentials(uri)}",
            expected="that it lets this user do this",
            got=_first_line(error),
            remedy="get the permission, or name a user who has it in URM_MLFLOW_URI",
        ) from error


@contextmanager
def brief_requests() -> Iterator[None]:
    """Have MLflow's client try a request once and for a second: for a server that is known to be away."""
    before = {name: os.environ.get(name) for name in _BRIEF}
    os.environ.update(_BRIEF)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def no_answer(uri: str, got: object) -> UnavailableError:
    """The error of a server that does not answer, without its credentials."""
    shown = hide_credentials(uri)
    return UnavailableError(
        f"MLflow at {shown}",
        expected="an answer",
        got=str(got).replace(uri, shown),
        remedy="start it with `urm up` or set URM_MLFLOW_URI",
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
