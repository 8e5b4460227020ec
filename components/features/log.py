"""The event log as the stage uses it: the columns it needs, each event's period, each user's shard."""

from collections.abc import Sequence
from datetime import timedelta
from functools import reduce
from operator import add
from pathlib import Path

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import SplitConfig
from components.exceptions import DataError
from components.features.expressions import instant

DAY = timedelta(days=1)
# Histories grow with the square of a user's days; a shard of this many events stays well within the memory limit.
EVENTS_PER_SHARD = 200_000


def attribute_column(name: str) -> str:
    """Column of the log that holds an event attribute."""
    return f"attribute_{name}"


def read_log(engine: ibis.BaseBackend, events: Path, split: SplitConfig, attributes: Sequence[str]) -> ir.Table:
    """Read the events of a folder once into the engine.

    Returns:
        A table with event_id, user_id, item_id, behavior, scenario, ts, the wanted attributes as text, `period` (see
        `period_of`) and `shard` (users in the order of their ids, cut into shards of about equal size).

    Raises:
        DataError: There are no events.
    """
    if not any(events.rglob("*.parquet")):
        raise _no_events(events)
    raw = engine.read_parquet(f"{events}/**/*.parquet")
    kept = raw.select(
        "event_id",
        "user_id",
        "item_id",
        "behavior",
        "scenario",
        ts=raw.ts.cast("timestamp('UTC', 6)"),
        period=period_of(raw.ts, split),
        **{attribute_column(name): raw.attributes.get(name, None) for name in attributes},
    )
    users = kept.group_by("user_id").agg(events=_.count())
    before = users.events.sum().over(ibis.cumulative_window(order_by=users.user_id)) - users.events
    shards = users.select("user_id", shard=(before // EVENTS_PER_SHARD).cast("int64"))
    log = engine.create_table("log", kept.join(shards, "user_id"))
    if log.count().execute() == 0:
        raise _no_events(events)
    return log


def period_of(ts: ir.TimestampValue, split: SplitConfig) -> ir.IntegerValue:
    """Number of the day of an event, where days turn at the cuts' time of day.

    No period has a cut inside: a row that closes a period holds all events before the next cut and none after it.
    Where the splits start at different times of day, a period is a part of a day.
    """
    starts = (split.train_start, split.validation_start, split.test_start)
    turns = sorted({(start - split.train_start) % DAY for start in starts})
    microseconds_a_day = DAY // timedelta(microseconds=1)
    return reduce(
        add, (ts.delta(instant(split.train_start + turn), unit="microsecond") // microseconds_a_day for turn in turns)
    )


def _no_events(events: Path) -> DataError:
    return DataError(
        f"events in {events}", expected="at least one event", got="none", remedy="run `urm ingest` on a log with rows"
    )
