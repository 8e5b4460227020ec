"""The opener of DuckDB: in this process, bounded in memory and threads, spilling to disk."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir

from components.engines.exhaustion import exhaustion_errors
from components.settings import Settings

# DuckDB takes 80 % of the memory by itself; this share of that is half of it. The other half is Python's: tables on
# their way to files, Feast, Great Expectations.
_SHARE = 5 / 8
_ROWS_PER_GROUP = 16_384  # of files by part: where rows come in another order, a group of every part is in memory


@contextmanager
def open_engine(spill: Path, settings: Settings) -> Iterator[ibis.BaseBackend]:
    """A DuckDB connection that is also Ibis' default, so that Feast's DuckDB offline store uses it too.

    What does not fit in `engine_memory` goes to the folder `spill`. Where that is not set, the limit is half of the
    memory that this machine has or, in a container, that its cgroup allows.

    Raises:
        ConfigError: The body needs more memory than that at once.
        UnavailableError: The disk is full.
    """
    options = {"threads": settings.num_threads} if settings.num_threads else {}
    # Else its allocator (jemalloc) keeps what is freed until the engine is closed, half a gigabyte and more.
    engine = ibis.duckdb.connect(temp_directory=str(spill), allocator_background_threads=True, **options)
    memory = settings.engine_memory or half_of_memory(engine)
    engine.raw_sql(f"SET memory_limit = '{memory}'")
    before = ibis.options.default_backend
    ibis.set_backend(engine)
    try:
        with exhaustion_errors(spill, memory):
            yield engine
    finally:
        ibis.options.default_backend = before
        engine.disconnect()


def memory_limit(engine: ibis.BaseBackend) -> int:
    """Bytes that the engine may hold in memory."""
    (limit,) = engine.raw_sql("SELECT parse_formatted_bytes(current_setting('memory_limit'))").fetchone()
    return int(limit)


def half_of_memory(engine: ibis.BaseBackend) -> str:
    """Half of what this machine or container has, of an engine without a limit yet."""
    number, unit = engine.raw_sql("SELECT current_setting('memory_limit')").fetchone()[0].split()
    return f"{float(number) * _SHARE:.1f}{unit}"


def read_folder(engine: ibis.BaseBackend, folder: Path) -> ir.Table:
    """All Parquet files below a folder; its parts by a column, `name=value`, become that column."""
    return engine.read_parquet(f"{glob.escape(str(folder))}/**/*.parquet", hive_partitioning=True)


def read_numbered(engine: ibis.BaseBackend, paths: Sequence[Path]) -> ir.Table:
    """These Parquet files with the columns `_file`, the absolute path, and `_position`, the row's number in it."""
    rows = engine.read_parquet(
        [str(path.absolute()) for path in paths], filename=True, file_row_number=True, hive_partitioning=False
    )
    return rows.rename(_file="filename", _position="file_row_number")


def write_parts(engine: ibis.BaseBackend, table: ir.Table, folder: Path, column: str, **options: Any) -> None:
    """Add a table to Parquet files in a folder per value of a column; `options` are those of DuckDB's COPY."""
    # Else parts beyond a hundred become many small files.
    engine.raw_sql("SET partitioned_write_max_open_files = 10000")
    engine.to_parquet(table, folder, partition_by=column, append=True, row_group_size=_ROWS_PER_GROUP, **options)
