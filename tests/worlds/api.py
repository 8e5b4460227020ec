"""Answers of the recall API."""

from typing import Any

from prometheus_client import generate_latest

from components.recall.api.problems import CODES
from tests.worlds.tiny import LAST_EVENT

JSON = {"content-type": "application/json"}
EVENT = {"event_id": "e1", "user_id": "3", "item_id": 1050, "ts": LAST_EVENT.isoformat()}


def problem(response: Any, status: int, code: str = "") -> str:
    """The sentence of a problem document of this status, and of this kind where one is named."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == status
    kind = body["type"].removeprefix("urn:problem-type:urm:")
    assert CODES[kind] == status and kind == (code or kind)
    return str(body["detail"])


def read_metrics(api: Any) -> str:
    """What the API's metrics port answers."""
    return generate_latest(api.app.state.metrics.registry).decode()
