"""Whom the demo's round trip chooses, whatever tasks and behaviours a run has."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import RunConfig, load_config
from components.local.round_trip import choose_visitor, go
from components.settings import Settings
from tests.worlds import CONFIGS
from tests.worlds.http_server import serve
from tests.worlds.tables import put, write

NEWEST = datetime(2026, 11, 1, tzinfo=UTC)
TASKS = ["title_query", "new_category"]


@pytest.fixture
def config() -> RunConfig:
    return load_config(CONFIGS / "amazon_beauty.yaml", {"tasks": TASKS})


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    def put_table(name: str, rows: list[dict[str, Any]]) -> Path:
        return write(tmp_path / name, None, rows)

    run = tmp_path / "run"
    contexts = [{"user_id": user, "split": "test", "num_items": n} for user, n in (("few", 1), ("some", 2), ("all", 9))]
    put(run, "features", {"contexts": put_table("contexts.parquet", contexts)})
    events = [
        {"user_id": "some", "item_id": 1, "behavior": "rate", "ts": NEWEST},
        {"user_id": "some", "item_id": 2, "behavior": "view", "ts": NEWEST - timedelta(days=1)},
        {"user_id": "few", "item_id": 3, "behavior": "view", "ts": NEWEST},
    ]
    items = [{"item_id": item, "external_id": f"SKU-{item}", "title": f"title {item}"} for item in range(1, 5)]
    put_table("events/part.parquet", events)
    put(run, "validate", {"events": tmp_path / "events", "items": put_table("items.parquet", items)})
    popular = [{"task": "new_category", "item_id": item} for item in (2, 4, 3)] + [{"task": "other", "item_id": 3}]
    put(run, "baseline", {"popularity": put_table("popularity.parquet", popular)})
    return run


def test_the_first_task_without_a_query_is_asked_after_what_the_user_did_last(
    run_dir: Path, config: RunConfig, tmp_path: Path
) -> None:
    visitor = choose_visitor(str(run_dir), config, Settings(home=tmp_path))
    assert visitor is not None
    assert (visitor.user_id, visitor.task, visitor.behavior) == ("some", "new_category", "rate")
    assert (visitor.external_id, visitor.item_title) == ("SKU-4", "title 4")
    assert (visitor.history, visitor.last_event) == (["title 1", "title 2"], NEWEST)


def test_an_api_with_tokens_is_asked_with_one(
    run_dir: Path, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visitor = choose_visitor(str(run_dir), config, Settings(home=tmp_path))
    assert visitor is not None
    sent: list[str] = []

    def answer(method: str, path: str, kind: str, body: Any) -> tuple[int, Any]:
        if method == "POST":
            sent.append(body["event_id"])
        return 200, {"event_ts": None, "event_id": sent[-1] if sent else None}

    asked: list[dict[str, str]] = []
    client = httpx.Client

    def open_client(**options: Any) -> httpx.Client:
        asked.append(options["headers"])
        return client(**options)

    monkeypatch.setattr(httpx, "Client", open_client)
    with serve(answer) as address:
        assert go(visitor, address, "urm_secret")[0]["event_id"] == sent[0]
        go(visitor, address)
    assert asked == [{"Authorization": "Bearer urm_secret"}, {}]


def test_nobody_is_chosen_where_nothing_can_be_shown(run_dir: Path, config: RunConfig, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    queries = load_config(CONFIGS / "amazon_beauty.yaml", {"tasks": TASKS[:1]})
    assert choose_visitor(str(run_dir), queries, settings) is None
    pq.write_table(pa.table({"task": ["new_category"], "item_id": [2]}), tmp_path / "popularity.parquet")
    assert choose_visitor(str(run_dir), config, settings) is None
