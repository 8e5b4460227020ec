"""The engine that Ibis expressions run on: DuckDB in this process, bounded in memory, spilling to disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import ibis
import ibis.expr.types as ir

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


def instant(moment: datetime) -> ir.TimestampScalar:
    """A moment as a literal of the type that the canonical tables use."""
    return ibis.literal(moment, type="timestamp('UTC', 6)")


def microseconds(timestamp: ir.TimestampValue) -> ir.IntegerValue:
    """Microseconds since 1970 UTC."""
    return timestamp.delta(instant(datetime.fromisoformat("1970-01-01T00:00:00+00:00")), unit="microsecond")


def seeded_key(seed: int, *values: ir.StringValue) -> ir.StringValue:
    """A text whose order is as good as random, the same for equal seed and values on every engine."""
    text = ibis.literal(str(seed))
    for value in values:
        text = text.concat("/", value)
    return text.hexdigest("md5")
