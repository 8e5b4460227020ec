"""The narrow frames that Great Expectations looks at, with the helper columns its rules need.

Rows are numbered across a table's files in the order of their paths, so that a row number leads back to a file and a
position in it. Frames hold the checked columns only; the attributes stay on disk. They come in batches: which keys
occur again is found over the whole table by the engine, and every rule about rows looks at one row at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ibis
import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from components.engines.engine import read_numbered
from components.exceptions import DataError
from components.validation.rules import EVENT_COLUMNS, ITEM_COLUMNS, ITEM_IS_KNOWN, KEYS, OCCURRENCE, SCHEMAS

READ_ROWS = 65_536  # at a time, from a file


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


def item_frames(files: Files, engine: ibis.BaseBackend, batch_rows: int) -> Iterator[pd.DataFrame]:
    """Checked columns of the items in batches of rows, index = row number."""
    for first, rows in _numbered(files, engine, ITEM_COLUMNS, batch_rows):
        yield _to_frame(first, rows)


def event_frames(
    files: Files, accepted_items: pd.Series[int], engine: ibis.BaseBackend, batch_rows: int
) -> Iterator[pd.DataFrame]:
    """Checked columns of the events, as `item_frames`; `accepted_items` are the items that later stages will see."""
    known = pa.array(accepted_items.unique(), pa.int64())
    for first, rows in _numbered(files, engine, EVENT_COLUMNS, batch_rows):
        yield _to_frame(first, rows.append_column(ITEM_IS_KNOWN, pc.is_in(rows.column("item_id"), value_set=known)))


def _to_frame(first: int, rows: pa.Table) -> pd.DataFrame:
    frame: pd.DataFrame = rows.to_pandas()
    frame.index = pd.RangeIndex(first, first + len(frame))
    return frame


def _numbered(
    files: Files, engine: ibis.BaseBackend, columns: Sequence[str], batch_rows: int
) -> Iterator[tuple[int, pa.Table]]:
    """The number of each batch's first row, and these columns of its rows with the occurrence of their key."""
    name = f"repeats_of_{files.table}"
    repeats = engine.create_table(name, _find_repeats(files, engine), temp=True)
    first = 0
    for rows in _batches(files, columns, batch_rows):
        last = first + len(rows)
        found = repeats.filter(repeats.row >= first, repeats.row < last).to_pyarrow()
        occurrences = np.ones(len(rows), dtype=np.int64)
        occurrences[found["row"].to_numpy() - first] = found[OCCURRENCE].to_numpy()
        yield first, rows.append_column(OCCURRENCE, pa.array(occurrences))
        first = last
    engine.drop_table(name)


def _batches(files: Files, columns: Sequence[str], batch_rows: int) -> Iterator[pa.Table]:
    """Rows of all files in their order, `batch_rows` at a time whatever the files hold."""
    data = ds.dataset([str(path) for path in files.paths], SCHEMAS[files.table], format="parquet")
    held: list[pa.RecordBatch] = []
    missing = batch_rows
    for batch in data.to_batches(
        columns=list(columns), batch_size=READ_ROWS, batch_readahead=1, fragment_readahead=1, use_threads=False
    ):
        while batch.num_rows >= missing:
            yield pa.Table.from_batches([*held, batch.slice(0, missing)])
            batch, held, missing = batch.slice(missing), [], batch_rows
        held.append(batch)
        missing -= batch.num_rows
    if missing < batch_rows:
        yield pa.Table.from_batches(held)


def _find_repeats(files: Files, engine: ibis.BaseBackend) -> ir.Table:
    """Number and occurrence of the rows whose key an earlier row has.

    Rows are counted by a hash of their key first, so that a key takes eight bytes of memory or disk. Only rows whose
    hash occurs again are put in order.
    """
    offsets = pd.DataFrame({"path": [str(path.absolute()) for path in files.paths], "offset": files.offsets[:-1]})
    rows = read_numbered(engine, files.paths).select("_file", "_position", key=KEYS[files.table])
    rows = rows.mutate(hash=rows.key.hash())
    counted = rows.group_by("hash").agg(times=rows.count())
    # A table, so that the engine knows how few they are and does not hold the rows instead.
    again = engine.create_table(f"hashes_of_{files.table}", counted.filter(counted.times > 1), temp=True)
    suspects = rows.semi_join(again, "hash")
    starts = ibis.memtable(offsets)
    placed = suspects.join(starts, suspects["_file"] == starts.path)
    numbered = placed.select("key", row=placed["_position"] + placed.offset)
    occurrence = ibis.row_number().over(group_by="key", order_by="row") + 1
    found = numbered.mutate(**{OCCURRENCE: occurrence})
    return found.filter(found[OCCURRENCE] > 1).select("row", OCCURRENCE).order_by("row")
