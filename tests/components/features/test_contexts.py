"""No feature sees an event at or after its cut: against a brute-force reading of the log, over random logs."""

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from components.config import RunConfig
from components.engines.duckdb import open_engine
from components.exceptions import DataError
from components.features.contexts import BYTES_PER_ITEM, retrieve_contexts, split_contexts
from components.features.log import read_log
from components.features.sources import write_sources
from components.features.store import create_feature_store, offline
from components.schemas.examples import CONTEXTS
from components.settings import Settings
from tests.worlds import REPOSITORY
from tests.worlds.logs import START, WEEK, Event, make_config, write_events, write_items

HISTORY_LENGTH = 3
CATEGORIES = {1: ["FOOD", "BREAD"], 2: ["FOOD", "MILK"], 3: ["FOOD", "BREAD"], 4: [], 5: ["HOME"]}
WORDS = {1: "bread", 2: "milk", 3: "bread", 4: None, 5: "home"}
MICROSECOND = timedelta(microseconds=1)
SETTINGS = Settings(feature_repo_dir=REPOSITORY / "feature_repo", num_threads=1)

ALIGNED = make_config(history_length=HISTORY_LENGTH)
# The splits start at different times of day.
BOUNDS = {"train_start": START, "validation_start": START + WEEK + timedelta(hours=5), "end": START + 4 * WEEK}
BOUNDS["test_start"] = START + 2 * WEEK + timedelta(hours=6)
SHIFTED = make_config(history_length=HISTORY_LENGTH, split=BOUNDS)


def retrieve(events: Sequence[Event], config: RunConfig, settings: Settings) -> list[dict[str, Any]]:
    """Contexts of every user at every cut with an event before it, through Feast."""
    asked = [
        {"context_id": number, "user_id": user, "cut_ts": cut, "split": split}
        for number, (user, (cut, split)) in enumerate(
            (user, pair)
            for user in sorted({event.user_id for event in events})
            for pair in config.features.split.cuts()
            if any(event.user_id == user and event.ts < pair[0] for event in events)
        )
    ]
    if not asked:
        return []
    schema = pa.schema([CONTEXTS.field(name) for name in ("context_id", "user_id", "cut_ts", "split")])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open_engine(folder / "spill", Settings(num_threads=1)) as engine:
            items = engine.read_parquet(str(write_items(folder / "items.parquet", CATEGORIES)))
            events_folder = write_events(folder / "events", events)
            log = read_log(engine, events_folder, config.features.split, [], folder / "log", print)
            write_sources(log, items, config.features, folder, print)
            store = create_feature_store(folder, settings, "a")
            with offline(folder):
                return retrieve_contexts(store, pa.Table.from_pylist(asked, schema=schema)).to_pylist()


def expect(context: dict[str, Any], events: Sequence[Event]) -> dict[str, Any]:
    """The same context, read off the log by hand."""
    user, cut = context["user_id"], context["cut_ts"]
    numbered = [(event.ts, number, event) for number, event in enumerate(events)]
    seen = [event for ts, _, event in sorted(numbered, key=lambda row: row[:2]) if event.user_id == user and ts < cut]
    last = {event.item_id: event for event in seen}
    counts = Counter(event.item_id for event in seen)
    newest = sorted(last, key=lambda item: (-last[item].ts.timestamp(), -counts[item], item))[:HISTORY_LENGTH]
    categories = Counter(WORDS[event.item_id] for event in seen if WORDS[event.item_id])
    return {
        "history_item_ids": newest,
        "history_counts": [counts[item] for item in newest],
        "history_days_since": [days(cut - last[item].ts) for item in newest],
        "history_behaviors": [last[item].behavior for item in newest],
        "num_events": len(seen),
        "num_items": len(last),
        "days_since_last": days(cut - seen[-1].ts),
        "top_categories": sorted(categories, key=lambda name: (-categories[name], name))[:5],
    }


def days(age: timedelta) -> float:
    return age / timedelta(days=1)


def assert_equal(context: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        got = context[name]
        if name in ("history_days_since", "days_since_last"):
            pairs = zip(got, value, strict=True) if isinstance(value, list) else [(got, value)]
            assert all(math.isclose(a, b, rel_tol=1e-6) for a, b in pairs), name
        else:
            assert got == value, name


def moments(config: RunConfig) -> st.SearchStrategy[datetime]:
    """Mostly instants right at, before and after the cuts, and a few shared by many events."""
    cuts = [cut for cut, _ in config.features.split.cuts()]
    offsets = [-timedelta(days=9), -timedelta(hours=7), -MICROSECOND, timedelta(0), MICROSECOND, timedelta(hours=3)]
    return st.builds(lambda cut, offset: cut + offset, st.sampled_from(cuts), st.sampled_from(offsets))


def logs(config: RunConfig, least: int = 1) -> st.SearchStrategy[list[Event]]:
    users, items = st.sampled_from(["a", "b", "c"]), st.sampled_from(sorted(CATEGORIES))
    behaviors = st.sampled_from(["purchase", "click"])
    event = st.builds(Event, user_id=users, item_id=items, ts=moments(config), behavior=behaviors)
    return st.lists(event, min_size=least, max_size=25)


by_split = pytest.mark.parametrize("config", [ALIGNED, SHIFTED], ids=["aligned", "shifted"])
# Each example builds a feature store: a failing one is shown as found, for shrinking it would take minutes.
RANDOM = hypothesis_settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)


@by_split
@given(data=st.data())
@RANDOM
def test_contexts_hold_exactly_what_came_before_the_cut(config: RunConfig, data: st.DataObject) -> None:
    events = data.draw(logs(config))
    for context in retrieve(events, config, SETTINGS):
        assert_equal(context, expect(context, events))


@by_split
@given(data=st.data())
@RANDOM
def test_no_event_at_or_after_a_cut_changes_a_feature(config: RunConfig, data: st.DataObject) -> None:
    """Another future: the events from one cut on are dropped and random ones put in their place."""
    events = data.draw(logs(config))
    cut, _ = data.draw(st.sampled_from(config.features.split.cuts()))
    past = [event for event in events if event.ts < cut]
    other = past + [event for event in data.draw(logs(config, least=0)) if event.ts >= cut]

    def at_cut(log: Sequence[Event]) -> list[dict[str, Any]]:
        contexts = retrieve(log, config, SETTINGS) if log else []
        return [context | {"context_id": None} for context in contexts if context["cut_ts"] == cut]

    assert at_cut(events) == at_cut(other)


def test_an_event_at_the_instant_of_the_cut_is_not_seen() -> None:
    contexts = retrieve([Event("a", 1, START - MICROSECOND), Event("a", 2, START)], ALIGNED, SETTINGS)
    assert contexts[0]["cut_ts"] == START
    assert contexts[0]["history_item_ids"] == [1]
    assert contexts[1]["history_item_ids"] == [2, 1]


def test_a_user_without_features_is_refused(engine: ibis.BaseBackend, tmp_path: Path, settings: Settings) -> None:
    items = engine.read_parquet(str(write_items(tmp_path / "items.parquet", CATEGORIES)))
    events = write_events(tmp_path / "events", [Event("a", 1, START)])
    log = read_log(engine, events, ALIGNED.features.split, [], tmp_path / "log", print)
    write_sources(log, items, ALIGNED.features, tmp_path, print)
    store = create_feature_store(tmp_path, settings, "a")
    chosen = pa.table({"context_id": [0], "user_id": ["a"], "cut_ts": [START], "split": ["train"]})
    with offline(tmp_path), pytest.raises(DataError, match=r"features of user a at 2024-01-08.*got none"):
        retrieve_contexts(store, chosen)


@pytest.mark.parametrize(("join_is_held", "sizes"), [(True, [2] * 9 + [1]), (False, [19])])
def test_batches_are_small_where_the_engine_keeps_the_join_in_memory(join_is_held: bool, sizes: list[int]) -> None:
    """The splits span 21 days, of which a context is joined to eleven on average."""
    contexts = ibis.memtable({"user_id": [f"{number:02}" for number in range(19)], "cut_ts": [START] * 19})
    memory = 4 * 2 * 11 * HISTORY_LENGTH * BYTES_PER_ITEM
    batches = list(split_contexts(contexts, ALIGNED.features, memory, join_is_held=join_is_held))
    assert [len(batch) for batch in batches] == sizes
    assert pa.concat_tables(batches)["user_id"].to_pylist() == [f"{number:02}" for number in range(19)]
