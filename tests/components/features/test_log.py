from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pytest

from components.config import SplitConfig
from components.exceptions import DataError
from components.features import log as log_module
from components.features.log import period_of, read_log
from tests.worlds.logs import START, WEEK, Event, make_config, write_events

MICROSECOND = timedelta(microseconds=1)
HOUR = timedelta(hours=1)


def periods(moments: list[datetime], split: SplitConfig) -> list[int]:
    table = ibis.memtable({"ts": moments}, schema={"ts": "timestamp('UTC', 6)"})
    return [int(value) for value in table.select(period=period_of(table.ts, split)).execute()["period"]]


def test_days_turn_at_the_time_of_day_of_the_cuts(engine: ibis.BaseBackend) -> None:
    split = make_config().features.split
    moments = [START - MICROSECOND, START, START + 24 * HOUR - MICROSECOND, START + 24 * HOUR, START + WEEK]
    assert periods(moments, split) == [-1, 0, 0, 1, 7]


def test_no_cut_lies_inside_a_period_even_if_splits_start_at_different_hours(engine: ibis.BaseBackend) -> None:
    validation, test = START + WEEK + 3 * HOUR, START + 2 * WEEK + 3 * HOUR + MICROSECOND
    split = SplitConfig(train_start=START, validation_start=validation, test_start=test, end=START + 4 * WEEK)
    for cut, _ in split.cuts():
        before, at = periods([cut - MICROSECOND, cut], split)
        assert before < at


def test_shards_split_users_by_their_events(logged: Callable[..., ir.Table], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "memory_limit", lambda engine: 2 * log_module.BYTES_PER_PAIR * 40)
    log = logged([Event(user, item, START) for user in ("a", "b", "c") for item in (1, 2)])
    shards = dict(log.select("user_id", "shard").distinct().execute().itertuples(index=False))
    assert shards == {"a": 0, "b": 0, "c": 1}


def test_a_large_log_is_read_some_days_at_a_time_and_says_how_far_it_is(
    engine: ibis.BaseBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "ROWS_PER_WRITE", 4)
    monkeypatch.setattr("components.progress.INTERVAL_SECONDS", 0)
    days = [START + timedelta(days=number) for number in range(5)]
    events = write_events(tmp_path / "events", [Event(user, 1, day) for day in days for user in ("a", "b", "c")])
    said: list[str] = []
    log = read_log(engine, events, make_config().features.split, [], tmp_path / "log", said.append)
    assert said[0] == "counting the events of every user"
    assert [line.split(",")[0] for line in said[1:]] == [f"reading the log: {done} events" for done in (6, 9, 12, 15)]
    kept = log.select("user_id", "ts").order_by("ts", "user_id").execute()
    assert list(kept.itertuples(index=False, name=None)) == [(user, day) for day in days for user in ("a", "b", "c")]


def test_attributes_become_columns(logged: Callable[..., ir.Table]) -> None:
    log = logged([Event("a", 1, START, attributes={"in_display": "true"}), Event("a", 2, START)], ["in_display"])
    values = log.order_by("item_id").execute()["attribute_in_display"].tolist()
    assert values == ["true", None]


def test_an_empty_log_is_refused(engine: ibis.BaseBackend, tmp_path: Path, logged: Callable[..., ir.Table]) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="at least one event, got none"):
        read_log(engine, tmp_path / "nothing", make_config().features.split, [], tmp_path / "log", print)
    with pytest.raises(DataError, match="at least one event, got none"):
        logged([])
