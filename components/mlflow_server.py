"""Whether MLflow's server answers, asked before MLflow's own client does, which tries a dead one for minutes."""

import httpx

from components.exceptions import ConfigError, UnavailableError
from components.settings import hide_credentials

_PROBE_SECONDS = 5.0


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
        answer = httpx.get(f"{uri.rstrip('/')}/", timeout=_PROBE_SECONDS, follow_redirects=True)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise no_answer(uri, str(error) or type(error).__name__) from error
    if answer.status_code == httpx.codes.FORBIDDEN and "Host header" in answer.text:
        raise ConfigError(
            f"MLflow at {hide_credentials(uri)}",
            expected="a server that takes requests by this host name",
            got=f"status 403, {answer.text[:80]}",
            remedy="have MLFLOW_SERVER_ALLOWED_HOSTS of that server name host and port of URM_MLFLOW_URI",
        )
    if answer.is_server_error:
        raise no_answer(uri, f"status {answer.status_code}")


def no_answer(uri: str, got: object) -> UnavailableError:
    """The error of a server that does not answer, without its credentials."""
    shown = hide_credentials(uri)
    return UnavailableError(
        f"MLflow at {shown}",
        expected="an answer",
        got=str(got).replace(uri, shown),
        remedy="start it with `urm up` or set URM_MLFLOW_URI",
    )
