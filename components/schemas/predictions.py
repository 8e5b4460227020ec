"""Tables that the baseline stage hands on: ranked lists per example, and popularity per task."""

import pyarrow as pa

PREDICTION_DEPTH = 500  # items kept per example, if the cut-off is not larger: room for recall at more than one k

# Best first, no item twice. `model`: popularity, own_history, item_knn, target_attention and what else
# `baseline.models` names (components/config/sections.py); urm is added by the evaluation.
PREDICTIONS = pa.schema(
    [
        pa.field("example_id", pa.int64(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("item_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("scores", pa.list_(pa.float32()), nullable=False),
    ]
)

# The fallback of the recall API; best first within a task.
POPULARITY = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
    ]
)
