"""Users of a feature store, one by one, however many they are."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.exceptions import MissingInputError
from components.features.store import USER_STATISTICS

SOURCE = f"{USER_STATISTICS}.parquet"  # that names all users


def read_users(folder: Path) -> Iterator[str]:
    """Every user that a store knows, once, in the order of its source; a batch of rows is in memory at a time.

    A user's rows follow one another in the source (`sources.py`).

    Args:
        folder: The Feast folder, as the features stage left it, or a copy of its source.

    Raises:
        MissingInputError: The folder has no source.
    """
    try:
        source = pq.ParquetFile(folder / SOURCE)
    except (OSError, pa.ArrowException) as error:
        raise MissingInputError(
            f"users of feature store {folder}", expected=SOURCE, got=error, remedy="run `urm features` again"
        ) from None
    last = None
    with source:
        for batch in source.iter_batches(columns=["user_id"]):
            for user_id in pc.run_end_encode(batch.column(0).cast(pa.string())).values.to_pylist():
                if user_id != last:
                    yield user_id
                last = user_id
