"""The one opener of DuckDB: in this process, bounded in memory and threads, spilling to disk."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import ibis

from components.exceptions import ConfigError, UnavailableError, UrmError
from components.settings import Settings

# DuckDB takes 80 % of the memory by itself; this share of that is half of it. The other half is Python's: tables on
# their way to files, Feast, Great Expectations.
_SHARE = 5 / 8
# As DuckDB, the system and SQLite, into which Feast writes, say it.
_FULL_DISK = ("max_temp_directory_size", "No space left on device", "database or disk is full")


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
    memory = settings.engine_memory or _half_of_memory(engine)
    engine.raw_sql(f"SET memory_limit = '{memory}'")
    before = ibis.options.default_backend
    ibis.set_backend(engine)
    try:
        with _exhaustion_errors(spill, memory):
            yield engine
    finally:
        ibis.options.default_backend = before
        engine.disconnect()


def memory_limit(engine: ibis.BaseBackend) -> int:
    """Bytes that the engine may hold in memory."""
    (limit,) = engine.raw_sql("SELECT parse_formatted_bytes(current_setting('memory_limit'))").fetchone()
    return int(limit)


def is_exhausted(error: BaseException) -> bool:
    """Whether memory or disk gave out, as DuckDB and Arrow say it; no fault of the data."""
    return _lacks_memory(error) or _lacks_disk(error)


def _half_of_memory(engine: ibis.BaseBackend) -> str:
    number, unit = engine.raw_sql("SELECT current_setting('memory_limit')").fetchone()[0].split()
    return f"{float(number) * _SHARE:.1f}{unit}"


@contextmanager
def _exhaustion_errors(spill: Path, memory: str) -> Iterator[None]:
    try:
        yield
    except UrmError:
        raise
    except Exception as error:  # Arrow, which fetches results, wraps what DuckDB raises
        if _lacks_disk(error):
            raise UnavailableError(
                f"disk of {spill}",
                expected=f"room for what does not fit in {memory} of memory, and for the stage's files",
                got="a full disk",
                remedy="free it, move the run or URM_CACHE_DIR to a larger one, or raise URM_ENGINE_MEMORY",
            ) from error
        if _lacks_memory(error):
            raise ConfigError(
                "setting URM_ENGINE_MEMORY",
                expected="more memory for these data",
                got=memory,
                remedy="raise it, or lower URM_NUM_THREADS, since each thread needs its own",
            ) from error
        raise


def _lacks_disk(error: BaseException) -> bool:
    return any(part in str(error) for part in _FULL_DISK)


def _lacks_memory(error: BaseException) -> bool:
    return isinstance(error, (duckdb.OutOfMemoryException, MemoryError)) or "Out of Memory Error" in str(error)
