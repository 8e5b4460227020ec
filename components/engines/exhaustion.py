"""Memory or disk that gives out under an engine, in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.exceptions import ConfigError, UnavailableError, UrmError

# As DuckDB, the system (and so Spark) and SQLite, into which Feast writes, say it.
_FULL_DISK = ("max_temp_directory_size", "No space left on device", "database or disk is full")
# As DuckDB, the JVM and Spark's own accounts say it.
_NO_MEMORY = ("Out of Memory Error", "java.lang.OutOfMemoryError", "UNABLE_TO_ACQUIRE_MEMORY")


def is_exhausted(error: BaseException) -> bool:
    """Whether memory or disk gave out, as engines and Arrow say it; no fault of the data."""
    return _lacks_memory(error) or _lacks_disk(error)


@contextmanager
def exhaustion_errors(spill: Path, memory: str) -> Iterator[None]:
    """Turn such errors into one sentence about the folder of what does not fit, or the limit of memory.

    Raises:
        ConfigError: The body needs more memory at once.
        UnavailableError: The disk is full.
    """
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
    return isinstance(error, MemoryError) or any(part in str(error) for part in _NO_MEMORY)
