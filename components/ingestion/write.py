"""Writing the canonical tables with exactly their Arrow schemas, one day of events per folder."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.ingestion.reading import Reading
from components.progress import Progress, Report

BATCH_ROWS = 65_536


def write_events(parts: Sequence[Reading], folder: Path, report: Report) -> int:
    """Write readable events as `date=YYYY-MM-DD/part-0.parquet` (UTC days), each day sorted by time and event_id.

    Args:
        parts: Readings of the same log; all events of a day are in one of them.
        folder: Where to; it is made.
        report: Called with the progress now and then.

    Returns:
        The number of rows.
    """
    folder.mkdir()
    progress = Progress(report, "writing events", "rows", sum(part.num_rows() for part in parts))
    for part in parts:
        rows = part.readable()
        dated = rows.mutate(date=rows.ts.strftime("%Y-%m-%d")).order_by("ts", "event_id")
        with_date = part.schema.append(pa.field("date", pa.string()))
        _write_days(_batches(dated, with_date, progress), folder)
    return progress.done


def _write_days(batches: Iterable[pa.RecordBatch], folder: Path) -> None:
    """Write sorted rows with a column `date` to a file per day; a day's rows follow one another.

    Not by `pyarrow.dataset.write_dataset`, which waits for ever once the disk is full (Arrow 25).
    """
    day: str | None = None
    with ExitStack() as opened:
        for batch in batches:
            runs = pc.run_end_encode(batch.column("date"))
            rows, first = batch.drop_columns(["date"]), 0
            for name, end in zip(runs.values.to_pylist(), runs.run_ends.to_pylist(), strict=True):
                if name != day:
                    opened.close()
                    day, place = name, folder / f"date={name}" / "part-0.parquet"
                    place.parent.mkdir()
                    writer = opened.enter_context(pq.ParquetWriter(place, rows.schema, compression="zstd"))
                writer.write_batch(rows.slice(first, end - first))
                first = end


def write_items(items: Reading, path: Path, report: Report) -> int:
    """Write readable items to one file, sorted by item_id and place in the source; returns the number of rows."""
    total, progress = 0, Progress(report, "writing items", "rows")
    with pq.ParquetWriter(path, items.schema, compression="zstd") as writer:
        numbered = items.readable().mutate(row=ibis.row_number().over(ibis.window()))  # the source's order among equals
        for batch in _batches(numbered.order_by("item_id", "row").drop("row"), items.schema, progress):
            writer.write_batch(batch)
            total += batch.num_rows
    return total


def _batches(rows: ir.Table, schema: pa.Schema, progress: Progress) -> Iterator[pa.RecordBatch]:
    for batch in rows.to_pyarrow_batches(chunk_size=BATCH_ROWS):
        yield batch.cast(schema)
        progress.add(batch.num_rows)
