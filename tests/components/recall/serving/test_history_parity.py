"""The history that a worker uses is the offline history of the same instant, by the features stage's own code.

Any log is cut at any instant: what lies before goes through the features stage and comes back as the online store says
it, the rest comes as live events. Two things are left out, as `components.recall.serving.context` says:
`top_categories`, and the counts of an item that had left the history's length and comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from components.engines.duckdb import open_engine
from components.features.histories import behavior_sequence, select_rows, user_statistics
from components.features.log import period_of
from components.features.store import MICROSECONDS_A_DAY, _history
from components.recall.serving.context import HistoryRule, KnownHistory, build_context
from components.recall.serving.engine import _known
from components.recall.state.events import Event, to_microseconds
from components.settings import Settings
from components.urm.data.request import UserContext
from tests.worlds.tiny import make_config

SPLIT = make_config().features.split
LENGTH, MANY = 3, 100
NOW = datetime(2026, 1, 1, tzinfo=UTC)
# Few items, users and hours, so that ties of instants and counts, quiet days and busy ones are common.
LOGS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.integers(1, 6),
        st.integers(0, 12 * 24 * 2),  # half hours
        st.integers(0, 1),  # microseconds
        st.sampled_from(["purchase", "view"]),
    ),
    min_size=1,
    max_size=25,
)
Row = tuple[str, int, int, int, str]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ibis.BaseBackend]:
    folder: Path = tmp_path_factory.mktemp("spill")
    with open_engine(folder, Settings(num_threads=1)) as engine:
        yield engine


def make_events(log: list[Row]) -> list[Event]:
    """Events whose ids are in no order of their instants."""
    return [
        Event(
            event_id=f"e{number * 7 % 101:03d}-{number}",
            user_id=user,
            item_id=item,
            behavior=behavior,
            ts=SPLIT.train_start + timedelta(minutes=30 * half_hours, microseconds=microseconds),
        )
        for number, (user, item, half_hours, microseconds, behavior) in enumerate(log)
    ]


def run_features(engine: ibis.BaseBackend, events: list[Event], length: int) -> dict[str, dict[str, Any]]:
    """What the features stage knows of each user after these events: the newest rows of both Feast views, as one."""
    if not events:
        return {}
    columns = {
        "event_id": [event.event_id for event in events],
        "user_id": [event.user_id for event in events],
        "item_id": [event.item_id for event in events],
        "behavior": [event.behavior for event in events],
        "category": [f"shelf {event.item_id}" for event in events],
        "ts": pa.array([event.ts for event in events], pa.timestamp("us", tz="UTC")),
    }
    raw = engine.create_table("log", pa.table(columns), overwrite=True)
    raw = raw.mutate(ts=raw.ts.cast("timestamp('UTC', 6)"))
    log = raw.mutate(period=period_of(raw.ts, SPLIT))
    rows = select_rows(log, SPLIT.train_start)
    sequences, statistics = (
        {row["user_id"]: row for row in table.order_by("known_at").to_pyarrow().to_pylist()}  # the last one stays
        for table in (behavior_sequence(rows, log, length), user_statistics(rows, log))
    )
    assert {user: row["known_at"] for user, row in sequences.items()} == {
        user: row["known_at"] for user, row in statistics.items()
    }
    return {user: row | statistics[user] for user, row in sequences.items()}


def offline_context(row: dict[str, Any]) -> UserContext:
    """The context one microsecond after the user's newest event, as `components.features.contexts` counts ages."""
    cut_us = row["last_us"] + 1
    return UserContext(
        item_ids=np.array(row["history_item_ids"], dtype=np.int64),
        counts=np.array(row["history_counts"], dtype=np.int32),
        days_since=((cut_us - np.array(row["history_last_us"])) / MICROSECONDS_A_DAY).astype(np.float32),
        behaviors=row["history_behaviors"],
        num_events=row["num_events"],
        num_items=row["num_items"],
        num_active_days=row["num_active_days"],
        days_since_last=(cut_us - row["last_us"]) / MICROSECONDS_A_DAY,
    )


def online_known(row: dict[str, Any] | None) -> KnownHistory:
    """What the worker makes of the online store's answer."""
    if row is None:
        return KnownHistory()
    now_us = to_microseconds(NOW)
    return _known(_history(row, now_us), now_us)


def compare(online: UserContext, offline: UserContext, comes_back: bool) -> None:
    assert online.num_events == offline.num_events
    assert online.num_active_days == offline.num_active_days
    assert online.days_since.tolist() == offline.days_since.tolist()
    assert np.float32(online.days_since_last) == np.float32(offline.days_since_last)
    if comes_back:
        return
    assert online.item_ids.tolist() == offline.item_ids.tolist()
    assert online.counts.tolist() == offline.counts.tolist()
    assert list(online.behaviors) == list(offline.behaviors)
    assert online.num_items == offline.num_items


@pytest.mark.parametrize("length", [LENGTH, MANY])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, max_examples=12)
@given(log=LOGS, cut_hours=st.integers(0, 13 * 24), seed=st.integers(0, 9))
@example(log=[("a", 1, 10, 0, "view"), ("a", 1, 10, 0, "purchase"), ("a", 2, 10, 1, "view")], cut_hours=5, seed=0)
@example(log=[("a", item, item, 0, "view") for item in (1, 2, 3, 4, 5, 1)], cut_hours=2, seed=0)
def test_online_history_is_the_offline_one(
    engine: ibis.BaseBackend, length: int, log: list[Row], cut_hours: int, seed: int
) -> None:
    events = make_events(log)
    cut = SPLIT.train_start + timedelta(hours=cut_hours)
    before = [event for event in events if event.ts < cut]
    known_rows, offline_rows = run_features(engine, before, length), run_features(engine, events, length)
    rule = HistoryRule(length=length, day_origin_us=to_microseconds(SPLIT.train_start))
    random = np.random.default_rng(seed)
    for user, row in offline_rows.items():
        known = online_known(known_rows.get(user))
        # Some of what the features hold already is still among the live events.
        live = [event for event in events if event.user_id == user and (event.ts >= cut or random.random() < 0.5)]
        live.sort(key=lambda event: (event.ts, event.event_id))
        left = {event.item_id for event in before if event.user_id == user} - known.items.keys()
        comes_back = any(event.item_id in left for event in live if event.ts >= cut)
        assert length == LENGTH or not left
        compare(build_context(known, live, rule), offline_context(row), comes_back)
