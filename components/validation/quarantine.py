"""Splitting a table: refused rows go to the quarantine one by one, all others to the accepted table.

A row that breaks several rules is quarantined once: under the reason of the first, with the messages of all. So
accepted and quarantined rows together are the input, no more and no less.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from components.addresses import link_file
from components.schemas.events import QUARANTINE
from components.validation.frames import Files
from components.validation.rules import KEYS, SCHEMAS, Rule

Refused = dict[int, list[Rule]]


def write_accepted(files: Files, refused: Refused, target: Path) -> int:
    """Write the rows that no rule refuses, under the file names they have; returns their number.

    The target is a folder or a file, as the table's root is.
    """
    written = 0
    for path, first, last in _spans(files):
        bad = _positions(refused, first, last)
        if len(bad) == last - first:
            continue
        place = target / path.relative_to(files.root) if files.root.is_dir() else target
        place.parent.mkdir(parents=True, exist_ok=True)
        if len(bad):
            keep = np.delete(np.arange(last - first), bad)
            pq.write_table(_read(files, path).take(keep), place, compression="zstd")
        else:
            link_file(path, place)
        written += last - first - len(bad)
    return written


def write_quarantined(files: Files, refused: Refused, writer: pq.ParquetWriter) -> None:
    """Append the refused rows of a table to an open quarantine file."""
    for path, first, last in _spans(files):
        bad = _positions(refused, first, last)
        if not len(bad):
            continue
        rows = _read(files, path).take(bad).to_pylist()
        entries = [
            _entry(files.table, row, refused[first + int(position)]) for position, row in zip(bad, rows, strict=True)
        ]
        writer.write_table(pa.Table.from_pylist(entries, schema=QUARANTINE))


def count_reasons(quarantine: Path, tables: Iterable[str]) -> dict[str, Counter[str]]:
    """Quarantined rows of each table by reason."""
    rows = pq.read_table(quarantine, columns=["table", "reason"])
    counted = rows.group_by(["table", "reason"]).aggregate([([], "count_all")]).to_pylist()
    return {
        table: Counter({row["reason"]: row["count_all"] for row in counted if row["table"] == table})
        for table in tables
    }


def _spans(files: Files) -> Iterator[tuple[Path, int, int]]:
    """Each file with the row numbers of its first row and of the next file's."""
    bounds = files.offsets.tolist()
    yield from zip(files.paths, bounds[:-1], bounds[1:], strict=True)


def _positions(refused: Refused, first: int, last: int) -> npt.NDArray[np.int64]:
    """Positions of refused rows within a file, ascending."""
    rows = np.fromiter(refused, dtype=np.int64, count=len(refused))
    return np.sort(rows[(rows >= first) & (rows < last)]) - first


def _read(files: Files, path: Path) -> pa.Table:
    return pq.ParquetFile(path).read().cast(SCHEMAS[files.table])


def _entry(table: str, row: dict[str, Any], rules: list[Rule]) -> dict[str, str | None]:
    if row.get("attributes") is not None:
        row["attributes"] = dict(row["attributes"])
    key = row[KEYS[table]]
    return {
        "table": table,
        "row_key": None if key is None else str(key),
        "reason": rules[0].reason,
        "message": "; ".join(rule.message.format_map(row) for rule in rules),
        "row": json.dumps(row, default=str, ensure_ascii=False),
    }
