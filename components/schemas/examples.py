"""Tables that the features stage hands to the models: catalogue, contexts, examples.

A *context* is one user at one cut instant with everything known strictly before it; an *example* is one task
asked of a context, with the catalogue items that answer it. Examples refer to contexts, so that a history is
stored once for all tasks.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.dataset as ds

from components.schemas.events import TIMESTAMP

BATCH_ROWS = 16_384  # that are in memory at a time

# Rows sorted by item_id; the row number is the item's *catalogue index* in all models.
CATALOGUE = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("train_events", pa.int64(), nullable=False),  # in the training window alone
        pa.field("popularity_quantile", pa.float32(), nullable=False),  # 0 rarest … 1 most frequent
    ]
)

CONTEXTS = pa.schema(
    [
        pa.field("context_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("cut_ts", TIMESTAMP, nullable=False),
        pa.field("split", pa.string(), nullable=False),  # train | validation | test
        # The user's distinct items before the cut, newest first; the four lists are parallel.
        pa.field("history_item_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("history_counts", pa.list_(pa.int32()), nullable=False),  # events of the item
        pa.field("history_days_since", pa.list_(pa.float32()), nullable=False),  # days from last event to cut
        pa.field("history_behaviors", pa.list_(pa.string()), nullable=False),  # behaviour of the last event
        pa.field("num_events", pa.int64(), nullable=False),
        pa.field("num_items", pa.int64(), nullable=False),
        pa.field("num_active_days", pa.int64(), nullable=False),
        pa.field("days_since_last", pa.float32(), nullable=False),
        pa.field("top_categories", pa.list_(pa.string()), nullable=False),  # most frequent first, in words
    ]
)

EXAMPLES = pa.schema(
    [
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("context_id", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("query", pa.string()),
        pa.field("target_item_ids", pa.list_(pa.int64()), nullable=False),  # distinct, in the catalogue
        pa.field("target_categories", pa.list_(pa.string()), nullable=False),  # in words, for the text target
    ]
)


def ragged(table: pa.Table, column: str) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
    """Values, flat, and row offsets [rows + 1] of a list column: row r is values[offsets[r]:offsets[r + 1]]."""
    array = table.column(column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], type=array.type)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.values.to_numpy(zero_copy_only=False)
    return values[offsets[0] : offsets[-1]], offsets - offsets[0]


def map_rows(parquet: Path, rows: ds.Expression, folder: Path) -> pa.Table:
    """The rows of a Parquet file that fulfil a condition, in their order, as a table that is memory-mapped.

    Its Arrow file lies in the folder without a name, as long as the table is used.
    """
    source = ds.dataset(parquet)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        with pa.ipc.new_file(file, source.schema) as writer:
            for batch in source.to_batches(
                filter=rows, batch_size=BATCH_ROWS, batch_readahead=1, fragment_readahead=1, use_threads=False
            ):
                writer.write_batch(batch)
        file.flush()
        return pa.ipc.open_file(pa.memory_map(file.name)).read_all()


def map_array(parts: Iterable[npt.NDArray[Any]], kind: npt.DTypeLike, folder: Path | None) -> npt.NDArray[Any]:
    """Parts, one after another, as one array that is memory-mapped; its file is as that of `map_rows`."""
    with tempfile.TemporaryFile(dir=folder) as file:
        for part in parts:
            part.astype(kind, copy=False).tofile(file)
        file.flush()
        return np.asarray(np.memmap(file, kind, "c")) if file.tell() else np.empty(0, dtype=kind)
