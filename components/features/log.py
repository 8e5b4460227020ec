"""The event log as the stage uses it: the columns it needs, each event's period, each user's shard.

It is written once to Parquet files by shard, so that all later work takes one shard of users after another and needs
memory for one.
"""

import shutil
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import add
from pathlib import Path

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import SplitConfig
from components.engines.engine import memory_limit, read_folder, write_parts
from components.exceptions import DataError
from components.features.expressions import instant
from components.progress import Progress, Report

DAY = timedelta(days=1)
_SECONDS_PER_DAY = 86_400
# A history is built of every row of a user with every item up to then, so it costs his events times his rows at most;
# what else is done with an event counts as much as so many rows.
ROWS_PER_EVENT = 8
ROWS_PER_WRITE = 10_000_000  # of the log at a time, so that it can be said how far the reading is
# Of the engine's memory: by trial a pair takes 100 bytes, and there are a third to a fifth as many as at most.
BYTES_PER_PAIR = 40


def attribute_column(name: str) -> str:
    """Column of the log that holds an event attribute."""
    return f"attribute_{name}"


def read_log(
    engine: ibis.BaseBackend,
    events: Path,
    split: SplitConfig,
    attributes: Sequence[str],
    folder: Path,
    report: Report,
) -> ir.Table:
    """Read the events of a folder once, some days after others, and write what the stage needs to another, by shard.

    Returns:
        A table over these files with event_id, user_id, item_id, behavior, scenario, ts, the wanted attributes as text,
        `period` (see `period_of`) and `shard` (users in the order of their ids, cut into shards of about equal cost).

    Raises:
        DataError: There are no events.
    """
    if not any(events.rglob("*.parquet")):
        raise _no_events(events)
    raw = read_folder(engine, events)
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
    report("counting the events of every user")
    shards = engine.create_table("shards", _shards(kept, split, memory_limit(engine)))
    if shards.count().execute() == 0:
        raise _no_events(events)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was ended
    days = kept.group_by(day=_.ts.epoch_seconds() // _SECONDS_PER_DAY).agg(events=_.count()).order_by("day").execute()
    progress = Progress(report, "reading the log", "events", int(days.events.sum()))
    for _number, some in days.groupby((days.events.cumsum() - days.events) // ROWS_PER_WRITE):
        first, last = (datetime.fromtimestamp(int(day) * _SECONDS_PER_DAY, UTC) for day in some.day.iloc[[0, -1]])
        of_days = kept.filter((kept.ts >= instant(first)) & (kept.ts < instant(last + DAY)))
        write_parts(engine, of_days.join(shards, "user_id"), folder, "shard")
        progress.add(int(some.events.sum()))
    engine.drop_table("shards")
    return read_folder(engine, folder)


def parts(log: ir.Table, work: str, report: Report) -> Iterator[tuple[int, ir.Table]]:
    """The shards of a log one after another, with their numbers; reports the work, how far it is, and how fast."""
    sizes = log.group_by("shard").agg(events=_.count()).order_by("shard").execute()
    total = int(sizes["events"].sum())
    report(f"{work}: {total:,} events in {len(sizes)} parts")
    progress = Progress(report, work, "events", total)
    for number, events in sizes.itertuples(index=False):
        yield int(number), log.filter(log.shard == int(number))
        progress.add(int(events))


def _shards(events: ir.Table, split: SplitConfig, memory: int) -> ir.Table:
    """The shard of every user: as many users as half of the memory is for, if not fewer than one."""
    is_recent = events.ts >= instant(split.train_start)  # older events share one row, see `histories.select_rows`
    users = events.group_by("user_id").agg(
        events=_.count(),
        recent=is_recent.sum(),
        days=(_.period.max(where=is_recent) - _.period.min(where=is_recent)).fill_null(0) + 1,
    )
    users = users.mutate(pairs=_.events * (ibis.least(_.recent, _.days) + 1 + ROWS_PER_EVENT))
    before = users.pairs.sum().over(ibis.cumulative_window(order_by=users.user_id)) - users.pairs
    return users.select("user_id", shard=(before // max(memory // 2 // BYTES_PER_PAIR, 1)).cast("int64"))


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
