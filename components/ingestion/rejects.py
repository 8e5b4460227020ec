"""Rows that cannot be held in the canonical tables, as quarantine rows with their reason."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from components.ingestion.reading import Column, Reading
from components.ingestion.write import BATCH_ROWS
from components.schemas.events import QUARANTINE

_KEYS = {"events": "event_id", "items": "item_id"}


def write_rejected(tables: Mapping[str, Sequence[Reading]], written: Mapping[str, int], path: Path) -> dict[str, int]:
    """Write the rejected rows of all tables, in parts, to one file; returns their number by table.

    A table whose rows are all `written` is not read again.
    """
    counts: dict[str, int] = {}
    with pq.ParquetWriter(path, QUARANTINE, compression="zstd") as writer:
        for name, parts in tables.items():
            counts[name] = 0
            if sum(part.num_rows() for part in parts) == written[name]:
                continue
            for batch in chain.from_iterable(map(quarantine_batches, parts)):
                writer.write_batch(batch)
                counts[name] += batch.num_rows
    return counts


def quarantine_batches(reading: Reading, limit: int | None = None) -> Iterator[pa.RecordBatch]:
    """The rejected rows of a table, or the first few, as batches of QUARANTINE."""
    columns = {column.name: column for column in reading.columns}
    key = columns[_KEYS[reading.name]]
    rejected = reading.rejected().limit(limit)
    rows = rejected.mutate(_key=key.raw.cast("string").name("_key"))
    for batch in rows.to_pyarrow_batches(chunk_size=BATCH_ROWS):
        entries = [_entry(reading, columns, row) for row in batch.to_pylist()]
        if entries:
            yield pa.RecordBatch.from_pylist(entries, schema=QUARANTINE)


def _entry(reading: Reading, columns: dict[str, Column], row: dict[str, object]) -> dict[str, object]:
    reason = str(row["_reason"])
    problem, _, name = reason.partition("_")
    column = columns[name]
    value = row.get(column.source)
    message = (
        f"{name} is missing" if problem == "missing" else f"{name} cannot be read from {column.source} = {value!r}"
    )
    content = {key: value for key, value in row.items() if not key.startswith("_")}
    return {
        "table": reading.name,
        "row_key": row["_key"],
        "reason": reason,
        "message": message,
        "row": json.dumps(content, default=str, ensure_ascii=False),
    }
