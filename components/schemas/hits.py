"""The per-example record of an evaluation, from which every recall can be recomputed."""

import pyarrow as pa

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
    ]
)
