"""The configured source as readings, and engine errors about its files as one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb
import ibis

from components.config import CompleteJourneySource, SequenceSource, Source, TableSource
from components.engines.exhaustion import is_exhausted
from components.exceptions import DataError
from components.ingestion import complete_journey, sequences, tables
from components.ingestion.ragged import find_ragged_row
from components.ingestion.reading import Reading


def read_table(source: Source, name: str, connection: ibis.BaseBackend) -> Reading:
    """Open the table "events" or "items" of the source; of the user's own files only the headers are read yet.

    Raises:
        DataError: A file or column is missing or unreadable.
    """
    with readable_errors(source):
        if isinstance(source, CompleteJourneySource):
            readers = {"events": complete_journey.read_events, "items": complete_journey.read_items}
            return readers[name](source, connection)
        if isinstance(source, SequenceSource):
            return {"events": sequences.read_events, "items": sequences.read_items}[name](source, connection)
        return {"events": tables.read_events, "items": tables.read_items}[name](source, connection)


@contextmanager
def readable_errors(source: Source) -> Iterator[None]:
    """Turn what DuckDB says of a broken file into a DataError.

    Raises:
        DataError: The body met a file that DuckDB cannot read.
    """
    try:
        yield
    except (duckdb.IOException, duckdb.DataError, duckdb.InvalidInputException, duckdb.NotSupportedError) as error:
        if is_exhausted(error):
            raise  # of the machine, not of the data
        if isinstance(source, TableSource):
            patterns = {"events": source.events, "items": source.items}
            for name, pattern in patterns.items():
                if found := find_ragged_row(name, pattern):
                    raise DataError(
                        f"source.{name} {pattern}",
                        expected="rows with as many fields as the header",
                        got=found,
                        remedy="look for a separator too many or too few, and quote values that have one",
                    ) from error
        raise DataError(
            f"source {source.kind}",
            expected="readable Parquet or CSV files",
            got=" ".join(str(error).split())[:300],
            remedy="fix or remove the file, then run `urm ingest --check`",
        ) from error
