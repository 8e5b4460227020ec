"""Writing the canonical tables with exactly their Arrow schemas, one day of events per folder."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.dataset as ds
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
        ds.write_dataset(
            pa.RecordBatchReader.from_batches(with_date, _batches(dated, with_date, progress)),
            folder,
            format="parquet",
            file_options=ds.ParquetFileFormat().make_write_options(compression="zstd"),
            partitioning=ds.partitioning(pa.schema([with_date.field("date")]), flavor="hive"),
            basename_template="part-{i}.parquet",
            existing_data_behavior="overwrite_or_ignore",  # the folder has the days of the parts before
            max_open_files=2,  # rows come day by day: an open file holds up to `min_rows_per_group` of them
            min_rows_per_group=BATCH_ROWS,
            use_threads=False,
        )
    return progress.done


def write_items(items: Reading, path: Path, report: Report) -> int:
    """Write readable items to one file, sorted by item_id; returns the number of rows."""
    total, progress = 0, Progress(report, "writing items", "rows")
    with pq.ParquetWriter(path, items.schema, compression="zstd") as writer:
        for batch in _batches(items.readable().order_by("item_id"), items.schema, progress):
            writer.write_batch(batch)
            total += batch.num_rows
    return total


def _batches(rows: ir.Table, schema: pa.Schema, progress: Progress) -> Iterator[pa.RecordBatch]:
    for batch in rows.to_pyarrow_batches(chunk_size=BATCH_ROWS):
        yield batch.cast(schema)
        progress.add(batch.num_rows)
