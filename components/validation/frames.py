"""The narrow frames that Great Expectations looks at, with the helper columns its rules need.

Rows are numbered across a table's files in the order of their paths, so that a row number leads back to a file and a
position in it. Frames hold the checked columns only; the attributes stay on disk. They come in batches: what a helper
column says is found over the whole table by DuckDB, and every rule about rows looks at one row at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from components.exceptions import DataError
from components.validation.rules import EVENT_COLUMNS, ITEM_COLUMNS, ITEM_IS_KNOWN, KEYS, OCCURRENCE, SCHEMAS


@dataclass(frozen=True)
class Files:
    """The Parquet files of one table."""

    table: str  # "events" or "items"
    root: Path  # the table's folder, or its only file
    paths: tuple[Path, ...]  # files in the order of row numbers
    # row number of each file's first row, and after the last the number of rows; shape [files + 1]
    offsets: npt.NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        """Rows of the table."""
        return int(self.offsets[-1])


def open_files(table: str, root: Path) -> Files:
    """List a table's files and check their schemas.

    Raises:
        DataError: A file has another schema than the canonical one, is no Parquet, or the table has no row.
    """
    paths = tuple(sorted(root.rglob("*.parquet"))) if root.is_dir() else (root,)
    lengths = [_check_schema(table, path) for path in paths]
    if not sum(lengths):
        raise DataError(f"table {table} in {root}", expected="at least one row", got="none", remedy="check the source")
    return Files(table, root, paths, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


def _check_schema(table: str, path: Path) -> int:
    schema = SCHEMAS[table]
    try:
        file = pq.ParquetFile(path)
    except (OSError, ValueError) as error:
        raise DataError(
            f"file {path}", expected="Parquet", got=" ".join(str(error).split()), remedy="run `urm ingest` again"
        ) from error
    with file:
        if not file.schema_arrow.equals(schema):
            wrong = [field.name for field in schema if field not in list(file.schema_arrow)]
            raise DataError(
                f"file {path}",
                expected=f"the columns of the canonical {table}",
                got=f"others in {', '.join(wrong) or 'their order'}",
                remedy="run `urm ingest` again",
            )
        return int(file.metadata.num_rows)


def item_frames(files: Files, connection: ibis.BaseBackend, batch_rows: int) -> Iterator[pd.DataFrame]:
    """Checked columns of the items in batches of rows, index = row number."""
    rows = _numbered(files, connection)
    return _frames(rows.select(*ITEM_COLUMNS, OCCURRENCE, "_file", "_position"), batch_rows)


def event_frames(
    files: Files, accepted_items: pd.Series[int], connection: ibis.BaseBackend, batch_rows: int
) -> Iterator[pd.DataFrame]:
    """Checked columns of the events, as `item_frames`; `accepted_items` are the items that later stages will see."""
    rows = _numbered(files, connection)
    known = ibis.memtable(pd.DataFrame({"known_id": accepted_items.unique()}))
    joined = rows.left_join(known, rows.item_id == known.known_id)
    joined = joined.mutate(**{ITEM_IS_KNOWN: joined.known_id.notnull()})
    return _frames(joined.select(*EVENT_COLUMNS, OCCURRENCE, ITEM_IS_KNOWN, "_file", "_position"), batch_rows)


def _numbered(files: Files, connection: ibis.BaseBackend) -> ir.Table:
    rows = connection.read_parquet(
        [str(path) for path in files.paths], filename=True, file_row_number=True, hive_partitioning=False
    ).rename(_file="filename", _position="file_row_number")
    first = ibis.row_number().over(group_by=KEYS[files.table], order_by=["_file", "_position"]) + 1
    return rows.mutate(**{OCCURRENCE: first})


def _frames(rows: ir.Table, batch_rows: int) -> Iterator[pd.DataFrame]:
    ordered = rows.order_by("_file", "_position").drop("_file", "_position")
    first = 0
    for batch in ordered.to_pyarrow_batches(chunk_size=batch_rows):
        frame: pd.DataFrame = batch.to_pandas()
        frame.index = pd.RangeIndex(first, first + len(frame))
        first += len(frame)
        yield frame
