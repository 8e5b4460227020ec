"""The configured source as readings, and engine errors about its files as one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import ibis

from components.config import CompleteJourneySource, Source
from components.exceptions import DataError
from components.ingestion import complete_journey, tables
from components.ingestion.reading import Reading


def read_source(source: Source, connection: ibis.BaseBackend) -> dict[str, Reading]:
    """Open the source; nothing but file headers is read yet.

    Returns:
        The readings "events" and "items".

    Raises:
        DataError: A file or column is missing or unreadable.
    """
    with readable_errors(source):
        if isinstance(source, CompleteJourneySource):
            return complete_journey.read(source, connection)
        return tables.read(source, connection)


@contextmanager
def readable_errors(source: Source) -> Iterator[None]:
    """Turn what DuckDB says of a broken file into a DataError.

    Raises:
        DataError: The body met a file that DuckDB cannot read.
    """
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise  # of the machine, not of the data
    except (duckdb.IOException, duckdb.DataError, duckdb.InvalidInputException, duckdb.NotSupportedError) as error:
        raise DataError(
            f"source {source.kind}",
            expected="readable Parquet or CSV files",
            got=" ".join(str(error).split())[:300],
            remedy="mend or remove the file, then run `urm ingest --check`",
        ) from error
