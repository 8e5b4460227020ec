"""The one opener of DuckDB: in this process, bounded in memory, spilling to disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ibis

MEMORY_LIMIT = "1500MB"


@contextmanager
def open_engine(spill: Path, num_threads: int = 0) -> Iterator[ibis.BaseBackend]:
    """A DuckDB connection that is also Ibis' default, so that Feast's DuckDB offline store uses it too.

    Args:
        spill: Folder for what does not fit in memory.
        num_threads: 0: every core.
    """
    options = {"threads": num_threads} if num_threads else {}
    engine = ibis.duckdb.connect(memory_limit=MEMORY_LIMIT, temp_directory=str(spill), **options)
    before = ibis.options.default_backend
    ibis.set_backend(engine)
    try:
        yield engine
    finally:
        ibis.options.default_backend = before
        engine.disconnect()
