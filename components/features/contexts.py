"""The CONTEXTS table: what Feast's point-in-time retrieval says of each chosen user at each cut."""

from collections.abc import Iterator
from datetime import timedelta

import ibis.expr.types as ir
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from components.config import FeaturesConfig
from components.exceptions import DataError
from components.features.feast import FeatureStore
from components.features.store import MICROSECONDS_A_DAY, retrieve_features
from components.schemas.examples import CONTEXTS, ragged

BYTES_PER_ITEM = 40  # of a history: id, count, instant, behaviour


def split_contexts(
    contexts: ir.Table, features: FeaturesConfig, memory: int, *, join_is_held: bool = True
) -> Iterator[pa.Table]:
    """Contexts by user, in batches whose retrieval fits in a quarter of the memory.

    Feast joins a context to every earlier row of its user, of which there is one per active day at most. Where the
    engine does not hold these (`join_is_held`), only the one that it keeps counts.
    """
    split = features.split
    # Half the days, on average.
    rows = (split.end - split.train_start) // timedelta(days=1) // 2 + 1 if join_is_held else 1
    size = max(memory // 4 // (rows * features.history_length * BYTES_PER_ITEM), 1)
    table = contexts.order_by("user_id", "cut_ts").to_pyarrow()
    return (table.slice(first, size) for first in range(0, table.num_rows, size))


def retrieve_contexts(store: FeatureStore, chosen: pa.Table) -> pa.Table:
    """Rows of CONTEXTS, sorted by context_id, of one batch of chosen context_id, user_id, cut_ts and split.

    Call within `store.offline`, on a store with the sources of these users.

    Raises:
        DataError: A user has no features at a cut.
    """
    entities = chosen.rename_columns({"cut_ts": "event_timestamp"}).to_pandas()
    features = retrieve_features(store, entities).sort_by("context_id")
    missing = features.filter(pc.is_null(features["num_events"]))
    if missing.num_rows:
        raise DataError(
            f"features of user {missing['user_id'][0]} at {missing['event_timestamp'][0]}",
            expected="a row known before the cut",
            got="none",
            remedy="run `urm features --force` again",
        )
    cut_ts = features["event_timestamp"].cast(CONTEXTS.field("cut_ts").type)
    cut_us = cut_ts.cast(pa.int64()).to_numpy()
    last_us, offsets = ragged(features, "history_last_us")
    days_since = (np.repeat(cut_us, np.diff(offsets)) - last_us) / MICROSECONDS_A_DAY
    columns = {name: features[name] for name in features.column_names} | {
        "cut_ts": cut_ts,
        "history_days_since": pa.ListArray.from_arrays(offsets.astype(np.int32), days_since.astype(np.float32)),
        "days_since_last": ((cut_us - features["last_us"].to_numpy()) / MICROSECONDS_A_DAY).astype(np.float32),
    }
    return pa.table({name: columns[name] for name in CONTEXTS.names}).cast(CONTEXTS)
