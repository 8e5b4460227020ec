"""Around a request: its id, the limit of its body, and what the log says of it."""

import json
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from components.config import RecallConfig
from components.recall.api.app import create_app
from components.recall.api.gateway import Gateway
from components.recall.api.requests import MAX_BODY_BYTES
from tests.components.recall.api.test_app import EVENT, problem
from tests.worlds.recall import Release


def test_an_answer_carries_the_id_of_its_request_or_a_new_one(api: TestClient) -> None:
    assert api.get("/healthz", headers={"X-Request-Id": "cart-17.a_b"}).headers["x-request-id"] == "cart-17.a_b"
    first, second = (api.get("/healthz").headers["x-request-id"] for _ in range(2))
    assert first != second and len(first) == 32
    spoiled = api.get("/healthz", headers={"X-Request-Id": 'x" injected'}).headers["x-request-id"]
    assert "injected" not in spoiled
    assert api.get("/nowhere", headers={"X-Request-Id": "lost"}).headers["x-request-id"] == "lost"


def test_a_server_error_carries_the_request_id(
    releases: tuple[Release, Release], recall_config: RecallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Gateway, "catalogue", fail)
    with TestClient(create_app(releases[0].settings, recall_config), raise_server_exceptions=False) as api:
        answer = api.get("/v1/tasks", headers={"X-Request-Id": "cart-17"})
    assert "report it" in problem(answer, 500, "server-error")
    assert (answer.headers["x-request-id"], answer.headers["cache-control"]) == ("cart-17", "no-store")


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_above_the_limit_is_refused(api: TestClient, announced: bool) -> None:
    body = json.dumps([{**EVENT, "attributes": {"note": "x" * 256}}] * (MAX_BODY_BYTES // 256)).encode()
    assert len(body) > MAX_BODY_BYTES

    def pieces() -> Iterator[bytes]:
        yield from (body[start : start + 65536] for start in range(0, len(body), 65536))

    response = api.post(
        "/v1/events", content=body if announced else pieces(), headers={"content-type": "application/json"}
    )
    assert problem(response, 413).startswith("body: expected ")
    assert response.headers["x-request-id"]
    assert api.get("/healthz").status_code == 200


def test_a_body_without_its_content_type_is_said(api: TestClient) -> None:
    """As `curl -d` sends it: FastAPI takes it for bytes."""
    response = api.post(
        "/v1/events", content=json.dumps(EVENT), headers={"content-type": "application/x-www-form-urlencoded"}
    )
    assert "expected JSON, with content-type application/json, got another content-type or none" in problem(
        response, 422
    )
    assert EVENT["user_id"] not in response.json()["detail"] + str(response.json()["errors"])


def test_the_log_of_a_request_names_the_route_and_no_user(api: TestClient) -> None:
    with capture_logs() as logs:
        api.get("/v1/users/somebody-private/recall")
    lines = [entry for entry in logs if entry["event"] == "request"]
    assert [(line["route"], line["status"]) for line in lines] == [("/v1/users/{user_id}/recall", 200)]
    assert "somebody-private" not in str(logs)
