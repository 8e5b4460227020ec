"""The row of a CSV file with another number of fields than the header: DuckDB names it seldom, and without the file."""

import csv
from contextlib import suppress
from itertools import chain

import fsspec

from components.ingestion.files import find_files

SEPARATORS = ",;|\t"


def find_ragged_row(table: str, pattern: str) -> str:
    """Where the first such row is and what it has, in words; empty if there is none that can be found.

    Reads the files from their beginning, so only call it for a source that DuckDB refused.
    """
    with suppress(Exception):  # of stores, of text that cannot be decoded: there is an error to tell of already
        filesystem, paths = find_files(table, pattern)
        for path in paths:
            if ".csv" in path.rsplit("/", 1)[-1].lower():
                found = _find_in_file(filesystem, path)
                if found:
                    return found
    return ""


def _find_in_file(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    with filesystem.open(path, "rt", compression="infer", encoding="utf-8-sig", errors="replace", newline="") as text:
        header, first = text.readline(), text.readline()
        # The name of a column may have such marks, too.
        separator = max(SEPARATORS, key=lambda mark: min(header.count(mark), first.count(mark)))
        width = len(next(csv.reader([header], delimiter=separator)))
        rows = csv.reader(chain([first], text), delimiter=separator)
        for row in rows if width > 1 else ():
            if row and len(row) != width:
                return f"{path}, line {rows.line_num + 1}: {len(row)} fields where the header has {width}"
    return ""
