"""A log in parts by time, so that each is put in order in memory, whatever the size of the whole.

Sorted at once, a hundred million events would spill several times their size to disk. Their rows are written once
instead, as they are, to a folder per part; what an adapter makes of a row's neighbours, the number of a repeated event,
looks at rows of one instant, and so of one part.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import ibis

from components.engines.duckdb import memory_limit, write_parts
from components.ingestion.reading import Reading

BYTES_PER_ROW = 1_000  # that sorting a row and numbering repeats takes, with room for attributes and queries
_SECONDS_PER_DAY = 86_400


def split_by_time(events: Reading, engine: ibis.BaseBackend, folder: Path) -> Sequence[Reading]:
    """The events in parts of whole days, the oldest first, their rows in a folder; one part if all fit in memory."""
    most = max(memory_limit(engine) // BYTES_PER_ROW, 1)
    if events.log is None or events.num_rows() <= most:
        return [events]
    rows, day = events.log.rows, events.log.ts.epoch_seconds() // _SECONDS_PER_DAY
    dated = rows.mutate(_day=day.fill_null(0))  # a row without a time is not readable, and may stand anywhere
    days = dated.group_by("_day").agg(events=dated.count())
    before = days.events.sum().over(ibis.cumulative_window(order_by=days._day)) - days.events
    parts = engine.create_table("parts", days.select("_day", _part=before // most), temp=True)
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that was ended
    placed = dated.join(parts, "_day").select(*rows.columns, "_part")
    write_parts(engine, placed, folder, "_part", compression="zstd")
    numbers = sorted(int(path.name.removeprefix("_part=")) for path in folder.iterdir())
    files = (f"{folder}/_part={number}/*.parquet" for number in numbers)
    return [events.log.read(engine.read_parquet(path, hive_partitioning=False)) for path in files]
