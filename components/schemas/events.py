"""Arrow schemas of the canonical tables, events and items, that every source is turned into, and of the quarantine."""

import pyarrow as pa

TIMESTAMP = pa.timestamp("us", tz="UTC")

EVENTS = pa.schema(
    [
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("behavior", pa.string(), nullable=False),
        pa.field("scenario", pa.string(), nullable=False),
        pa.field("query", pa.string()),
        pa.field("ts", TIMESTAMP, nullable=False),
        pa.field("attributes", pa.map_(pa.string(), pa.string())),
    ]
)

ITEMS = pa.schema(
    [
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("external_id", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("category", pa.list_(pa.string()), nullable=False),  # top → leaf, may be empty
        pa.field("brand", pa.string()),
        pa.field("price", pa.float64()),
        pa.field("image_uri", pa.string()),
        pa.field("created_at", TIMESTAMP),
        pa.field("available", pa.bool_(), nullable=False),
    ]
)

# Rows that no later stage sees; a row stands here once, under the first rule it breaks.
QUARANTINE = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),  # events | items
        pa.field("row_key", pa.string()),  # event_id or item_id; null where the source row has none
        pa.field("reason", pa.string(), nullable=False),
        pa.field("message", pa.string(), nullable=False),
        pa.field("row", pa.string(), nullable=False),  # JSON
    ]
)
