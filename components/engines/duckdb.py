"""The one opener of DuckDB: in this process, bounded in memory and threads, spilling to disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ibis

from components.settings import Settings


@contextmanager
def open_engine(spill: Path, settings: Settings) -> Iterator[ibis.BaseBackend]:
    """A DuckDB connection that is also Ibis' default, so that Feast's DuckDB offline store uses it too.

    What does not fit in `engine_memory` goes to the folder `spill`.
    """
    options = {"threads": settings.num_threads} if settings.num_threads else {}
    engine = ibis.duckdb.connect(memory_limit=settings.engine_memory, temp_directory=str(spill), **options)
    before = ibis.options.default_backend
    ibis.set_backend(engine)
    try:
        yield engine
    finally:
        ibis.options.default_backend = before
        engine.disconnect()
