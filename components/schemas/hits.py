"""The per-example record of an evaluation, from which every recall and NDCG can be recomputed."""

from collections.abc import Iterable

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from components.schemas.events import TIMESTAMP

# Recall@k of a row is hits / min(targets, k).
HITS = pa.schema(
    [
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("k", pa.int32(), nullable=False),
        pa.field("hits", pa.int32(), nullable=False),  # targets among the first k items
        pa.field("targets", pa.int32(), nullable=False),  # all targets of the example
        pa.field("ndcg", pa.float32()),  # NDCG@k; null in records made before it was kept
        # The query of a task with held-out queries, whose categories the bootstrap draws, too; null elsewhere.
        pa.field("held_out_query", pa.string()),
        pa.field("cut_ts", TIMESTAMP),  # of the example's context; null in records made before it was kept
    ]
)


def read_hits(path: str, k: int, models: Iterable[str]) -> pd.DataFrame:
    """Rows of one cut-off and of these models; columns that an older record lacks are null."""
    wanted = [("k", "==", k), ("model", "in", sorted(models))]
    rows: pd.DataFrame = pq.read_table(path, schema=HITS, filters=wanted).to_pandas()
    return rows
