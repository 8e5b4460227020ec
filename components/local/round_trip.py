"""One live round trip: an event goes in at the API, and the user's new recall comes out."""

import time
import uuid
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
from rich.console import Console
from rich.table import Table

from components.addresses import fetch
from components.config import RunConfig
from components.exceptions import UnavailableError
from components.settings import Settings
from components.storage import require_result

_SHOWN = 10
_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.02


@dataclass(frozen=True)
class Visitor:
    """The user of the round trip."""

    user_id: str  # a user of the last test cut
    history: list[str]  # titles of their last items, newest first
    last_event: datetime  # when they were last seen
    task: str  # what is recalled for them
    behavior: str  # what they do now, as they did last
    external_id: str  # a popular item they never had, which they now act on
    item_title: str


def choose_visitor(run_dir: str, config: RunConfig, settings: Settings) -> Visitor | None:
    """The user with the median length of history among those of the test cuts.

    None if no task of the run does without a query, or the user had every popular item.
    """
    import pyarrow.compute as pc
    import pyarrow.dataset as ds
    import pyarrow.parquet as pq

    task = next((task.name for task in config.tasks if not task.needs_query), None)
    if task is None:
        return None
    cache = settings.cache_path / "inputs"

    def path(stage: str, name: str) -> Path:
        return fetch(require_result(run_dir, stage).outputs[name], cache)

    contexts = pq.read_table(path("features", "contexts"), columns=["user_id", "split", "num_items"])
    ranked = contexts.filter(pc.equal(contexts["split"], "test"))
    ranked = ranked.sort_by([("num_items", "ascending"), ("user_id", "ascending")])
    user_id = ranked["user_id"][ranked.num_rows // 2].as_py()
    events = (
        ds.dataset(path("validate", "events"), format="parquet", partitioning="hive")
        .to_table(columns=["item_id", "behavior", "ts"], filter=ds.field("user_id") == user_id)
        .sort_by([("ts", "descending")])
    )
    items = pq.read_table(path("validate", "items"), columns=["item_id", "external_id", "title"])
    named = {row["item_id"]: (row["external_id"], row["title"]) for row in items.to_pylist()}
    had = list(dict.fromkeys(events["item_id"].to_pylist()))
    popular = pq.read_table(path("baseline", "popularity"), filters=[("task", "=", task)])["item_id"].to_pylist()
    new = next((item for item in popular if item not in set(had)), None)
    if new is None:
        return None
    history, newest = [named[item][1] for item in had[:_SHOWN]], events.slice(0, 1).to_pylist()[0]
    return Visitor(user_id, history, newest["ts"], task, newest["behavior"], *named[new])


def go(visitor: Visitor, api_url: str, token: str = "") -> tuple[dict[str, Any], float]:
    """Send the event and read until the answer is the event's; returns it and the seconds that took.

    `token` is one with the scopes `read` and `write`, where the API asks for it.

    Raises:
        UnavailableError: The API does not answer, or no worker has computed the result in time.
    """
    event_id = f"demo-{uuid.uuid4()}"
    address = f"/v1/users/{quote(visitor.user_id, safe='')}/recall"
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        with httpx.Client(base_url=api_url, timeout=10, headers=headers) as client:
            before = client.get(address, params={"task": visitor.task}).raise_for_status().json()
            seen = datetime.fromisoformat(before["event_ts"]) if before["event_ts"] else visitor.last_event
            event = {
                "event_id": event_id,
                "user_id": visitor.user_id,
                "external_id": visitor.external_id,
                "behavior": visitor.behavior,
                # The log's own time goes on, so that days since the last purchase stay what they were.
                "ts": (max(seen, visitor.last_event) + timedelta(minutes=1)).isoformat(),
            }
            start = time.perf_counter()
            client.post("/v1/events", json=event).raise_for_status()
            asked: dict[str, str | int] = {"task": visitor.task, "k": _SHOWN}
            while time.perf_counter() - start < _TIMEOUT_SECONDS:
                answer: dict[str, Any] = client.get(address, params=asked).raise_for_status().json()
                if answer["event_id"] == event_id:
                    return answer, time.perf_counter() - start
                time.sleep(_POLL_SECONDS)
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"recall API at {api_url}", expected="an answer", got=error, remedy="look at .urm/logs/recall-api.log"
        ) from None
    raise UnavailableError(
        f"recall of user {visitor.user_id}",
        expected=f"a result for event {event_id} within {_TIMEOUT_SECONDS:.0f} s",
        got="the old one",
        remedy="look at .urm/logs/recall-worker.log",
    )


def print_round_trip(console: Console, visitor: Visitor, answer: dict[str, Any], seconds: float) -> None:
    """Show the history beside the new recall."""
    table = Table(
        title=f"Live: user {visitor.user_id}, {visitor.behavior} of “{visitor.item_title}”; "
        f"new recall after {seconds:.2f} s",
        title_justify="left",
    )
    table.add_column("history, newest first")
    table.add_column(f"recalled now ({answer['task']})")
    recalled = [item["title"] or str(item["item_id"]) for item in answer["items"]]
    history = [visitor.item_title, *visitor.history][: len(recalled)]
    for row in range(len(recalled)):
        table.add_row(history[row] if row < len(history) else "", recalled[row])
    console.print(table)
