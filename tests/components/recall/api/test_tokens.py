"""Tokens of the API: what the file holds, and whom the API lets in."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

import httpx
import pytest
import redis
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from components.client import LONGEST_PAUSE_SECONDS, RecallClient
from components.config import RecallConfig
from components.exceptions import ConfigError
from components.recall.api import tokens as tokens_module
from components.recall.api.app import create_app
from components.recall.api.tokens import Scope, TokenList, Tokens, issue_token, read_tokens, revoke_token
from components.recall.state.scripts import STREAM
from tests.components.recall.api.test_app import EVENT, problem
from tests.worlds.recall import Release, serve_release


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


@pytest.fixture
def guarded(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig, path: Path
) -> Iterator[tuple[TestClient, dict[str, str]]]:
    """The API with a token for reading and one for both."""
    secrets = {
        "reader": issue_token(path, "reader", [Scope.READ]),
        "both": issue_token(path, "both", [Scope.READ, Scope.WRITE]),
    }
    serve_release(client, releases[0])
    settings = releases[0].settings.model_copy(update={"api_tokens_file": path})
    with TestClient(create_app(settings, recall_config), raise_server_exceptions=False) as api:
        yield api, secrets


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def test_the_file_holds_no_secret(path: Path) -> None:
    secret = issue_token(path, "shop", [Scope.READ])
    assert secret.startswith("urm_") and len(secret) > 40
    assert secret not in path.read_text()
    tokens = Tokens(path)
    found = tokens.find(secret)
    assert found is not None and (found.name, found.scopes) == ("shop", (Scope.READ,))
    assert tokens.find(secret + "x") is None


def test_issued_and_revoked_tokens_count_without_a_restart(path: Path) -> None:
    first = issue_token(path, "first", [Scope.READ])
    tokens = Tokens(path)
    second = issue_token(path, "second", [Scope.WRITE])
    assert tokens.find(second) is not None
    read_at = path.stat().st_mtime_ns
    revoke_token(path, "first")
    os.utime(path, ns=(read_at, read_at))  # in the same tick of the file system's clock
    assert tokens.find(first) is None and tokens.find(second) is not None


def test_changes_at_once_lose_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    issue_token(path, "leaked", [Scope.READ])
    read = tokens_module.read_tokens

    def read_slowly(path: Path) -> TokenList:
        found = read(path)
        time.sleep(0.05)  # in which the others read the same
        return found

    monkeypatch.setattr(tokens_module, "read_tokens", read_slowly)
    with ThreadPoolExecutor(5) as pool:
        made = [pool.submit(issue_token, path, f"new-{number}", [Scope.READ]) for number in range(4)]
        taken = pool.submit(revoke_token, path, "leaked")
        secrets = [one.result() for one in made]
        taken.result()
    assert {token.name for token in read(path).tokens} == {f"new-{number}" for number in range(4)}
    assert len(set(secrets)) == 4


def test_a_file_that_is_being_spoiled_takes_nobody_in_or_out_and_one_that_is_gone_everybody_out(path: Path) -> None:
    secret = issue_token(path, "shop", [Scope.READ])
    tokens = Tokens(path)
    path.write_text("{")
    assert tokens.find(secret) is not None
    path.unlink()
    with capture_logs() as logs:
        assert tokens.find(secret) is None  # whoever takes the file away revokes what is in it
    assert [line["event"] for line in logs] == ["token file is gone, no token is valid"]
    assert issue_token(path, "new", [Scope.READ]) and tokens.find(secret) is None
    path.unlink()
    with pytest.raises(ConfigError, match=r"token file .*: expected the file that `urm recall token create` writes"):
        Tokens(path)


def test_a_file_that_could_not_be_read_once_is_read_when_it_can(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `chmod`, which changes neither its time nor its size."""
    secret = issue_token(path, "leaked", [Scope.READ])
    tokens = Tokens(path)
    assert tokens.find(secret) is not None
    path.write_text('{"tokens": []}')
    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(tokens_module, "read_tokens", raises(PermissionError("denied")))
        assert tokens.find(secret) is not None
        assert tokens.find(secret) is not None
    assert [line["event"] for line in logs] == ["tokens cannot be read, the earlier ones stay"]
    assert tokens.find(secret) is None


def raises(error: Exception) -> Callable[[Path], NoReturn]:
    def fail(_: Path) -> NoReturn:
        raise error

    return fail


@pytest.mark.parametrize(
    ("content", "got"),
    [("{", "EOF"), ('{"tokens": [{"name": "a"}]}', "Field required at tokens.0.scopes"), ('{"token": []}', "token")],
)
def test_a_damaged_file_is_named(path: Path, content: str, got: str) -> None:
    path.write_text(content)
    with pytest.raises(ConfigError, match=got):
        read_tokens(path)


def test_names_are_unique_and_known(path: Path) -> None:
    issue_token(path, "shop", [Scope.READ])
    with pytest.raises(ConfigError, match="token 'shop': expected a new name, got one in use"):
        issue_token(path, "shop", [Scope.READ])
    with pytest.raises(ConfigError, match="expected a name of letters"):
        issue_token(path, "the shop", [Scope.READ])
    with pytest.raises(ConfigError, match="token 'gone': expected one of shop, got another"):
        revoke_token(path, "gone")


def test_requests_need_a_token_of_the_right_scope(guarded: tuple[TestClient, dict[str, str]]) -> None:
    api, secrets = guarded
    read = "/v1/users/3/recall"
    refused = api.get(read)
    assert problem(refused, 401).startswith("header 'Authorization': expected Bearer and a token of this API, got none")
    assert refused.headers["www-authenticate"] == "Bearer"
    assert "got an unknown token" in problem(api.get(read, headers=bearer("urm_guess")), 401)
    assert api.get(read, headers=bearer(secrets["reader"])).status_code == 200
    assert api.get("/v1/tasks", headers=bearer(secrets["reader"])).status_code == 200
    detail = problem(api.post("/v1/events", json=EVENT, headers=bearer(secrets["reader"])), 403)
    assert detail == "token 'reader': expected the scope write, got read; use another token."
    assert api.post("/v1/events", json=EVENT, headers=bearer(secrets["both"])).status_code == 202


def test_nothing_is_stored_for_who_may_not_write(
    guarded: tuple[TestClient, dict[str, str]], client: redis.Redis
) -> None:
    api, secrets = guarded
    before = client.dbsize()
    for headers in ({}, bearer(secrets["reader"])):
        api.post("/v1/events", json=EVENT, headers=headers)
    assert client.dbsize() == before


def test_probes_and_the_documentation_need_no_token(guarded: tuple[TestClient, dict[str, str]]) -> None:
    api, _ = guarded
    for path in ("/healthz", "/readyz", "/readyz/intake", "/docs", "/openapi.json"):
        assert api.get(path).status_code == 200, path
    schema: dict[str, Any] = api.get("/openapi.json").json()
    assert schema["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert schema["paths"]["/v1/events"]["post"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in schema["paths"]["/healthz"]["get"]


def test_the_token_file_is_found_by_its_setting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from components.settings import Settings

    monkeypatch.setitem(os.environ, "URM_API_TOKENS_FILE", str(path))
    assert Settings().api_tokens_file == path


def test_scopes_open_what_they_name_and_nothing_else(guarded: tuple[TestClient, dict[str, str]], path: Path) -> None:
    api, _ = guarded
    calls = [
        ("read", "GET", "/v1/tasks", None),
        ("read", "POST", "/v1/users/recall", {"user_ids": ["3"]}),
        ("read", "POST", "/v1/events/lineage", {"user_id": "3", "event_id": "e1"}),
        ("write", "POST", "/v1/events", {**EVENT, "event_id": "by scope"}),
        ("ask", "POST", "/v1/recall", {"user_id": "3"}),
    ]
    for scope in Scope:
        secret = issue_token(path, scope, [scope])
        for name, method, address, body in calls:
            status = api.request(method, address, json=body, headers=bearer(secret)).status_code
            assert (status == 403) == (scope != name), (scope, name)


@pytest.mark.parametrize(("secret", "status"), [("", 401), ("urm_guess", 401), ("reader", 403)])
def test_a_body_is_not_read_before_its_token(
    guarded: tuple[TestClient, dict[str, str]], secret: str, status: int
) -> None:
    """Whoever has no token may not make a process read megabytes, nor learn what is wrong with a body."""
    api, secrets = guarded
    taken = []

    def pieces() -> Iterator[bytes]:
        for _ in range(100):
            taken.append(65536)
            yield b"x" * 65536

    async def post() -> httpx.Response:
        async def body() -> AsyncIterator[bytes]:
            for piece in pieces():
                yield piece

        transport = httpx.ASGITransport(api.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as http:
            headers = bearer(secrets.get(secret, secret)) if secret else {}
            return await http.post("/v1/events", content=body(), headers=headers)

    assert asyncio.run(post()).status_code == status
    assert taken == []


def test_a_caller_beyond_the_rate_waits_in_every_process_and_others_do_not(
    client: redis.Redis, releases: tuple[Release, Release], path: Path
) -> None:
    secrets = [issue_token(path, name, [Scope.READ, Scope.WRITE]) for name in ("busy", "calm")]
    serve_release(client, releases[0])
    settings = releases[0].settings.model_copy(update={"api_tokens_file": path})
    config = RecallConfig(k=10, requests_per_minute=5)
    batch = [{**EVENT, "event_id": f"e{n}"} for n in range(3)]
    with TestClient(create_app(settings, config)) as api, TestClient(create_app(settings, config)) as other:
        # Two requests and three events, in two processes.
        assert [one.get("/v1/tasks", headers=bearer(secrets[0])).status_code for one in (api, other)] == [200, 200]
        assert api.post("/v1/events", json=batch, headers=bearer(secrets[0])).status_code == 202
        for one in (api, other):
            refused = one.get("/v1/tasks", headers=bearer(secrets[0]))
            assert "at most 5 requests and events a minute, got more" in problem(refused, 429, "rate-limited")
            assert int(refused.headers["retry-after"]) > 0
            assert one.get("/v1/tasks", headers=bearer(secrets[1])).status_code == 200
            assert one.get("/healthz").status_code == 200
        assert client.xlen(STREAM) == 3


def test_the_pauses_of_a_client_outlast_the_limit(client: redis.Redis, releases: tuple[Release, Release]) -> None:
    """A minute's requests weigh less and less over the minute after it."""
    serve_release(client, releases[0])
    with TestClient(create_app(releases[0].settings, RecallConfig(k=10, requests_per_minute=1))) as api:
        answers = [api.get("/v1/tasks") for _ in range(2)]
    pause = int(answers[1].headers["retry-after"])
    tries = signature(RecallClient).parameters["tries"].default
    assert pause * (tries - 1) > 120
    assert pause <= LONGEST_PAUSE_SECONDS


def test_a_list_that_is_longer_than_the_limit_of_a_minute_is_not_told_to_wait(
    client: redis.Redis, releases: tuple[Release, Release]
) -> None:
    serve_release(client, releases[0])
    batch = [{**EVENT, "event_id": f"e{n}"} for n in range(6)]
    with TestClient(create_app(releases[0].settings, RecallConfig(k=10, requests_per_minute=5))) as api:
        refused = api.post("/v1/events", json=batch)
        assert "at most 5 in one request" in problem(refused, 413, "body-too-large")
        assert "retry-after" not in refused.headers
        assert api.post("/v1/events", json=batch[:5]).status_code == 202


def test_pages_of_other_origins_get_no_permission(guarded: tuple[TestClient, dict[str, str]]) -> None:
    api, secrets = guarded
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for answer in (
        api.get("/v1/tasks", headers={**bearer(secrets["reader"]), **origin}),
        api.options("/v1/events", headers=origin),
    ):
        assert not [name for name in answer.headers if name.startswith("access-control-")]
