"""Feast definitions: what is known of a user at an instant, the same offline (training) and online (serving).

A row's timestamp is the first instant at which the row may be known: one microsecond after the last event in it.
Point-in-time retrieval includes equality, so a cut never sees an event of its own instant. There is no TTL: what a
user did stays true, and its age is in the row.
"""

from __future__ import annotations

from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
from feast.types import Array, Int32, Int64, String

TIMESTAMP_FIELD = "known_at"


def _source(name: str) -> FileSource:
    """A Parquet file beside the registry."""
    return FileSource(name=name, path=f"{name}.parquet", timestamp_field=TIMESTAMP_FIELD)


user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING, description="A customer.")

behavior_sequence = FeatureView(
    name="behavior_sequence",
    description="The user's distinct items so far, newest first; the four lists are parallel.",
    entities=[user],
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="history_item_ids", dtype=Array(Int64)),
        Field(name="history_counts", dtype=Array(Int32), description="Events of the item."),
        Field(name="history_last_us", dtype=Array(Int64), description="Its last event, microseconds since 1970 UTC."),
        Field(name="history_behaviors", dtype=Array(String), description="Behaviour of its last event."),
    ],
    source=_source("behavior_sequence"),
)

user_statistics = FeatureView(
    name="user_statistics",
    description="Counts over the user's whole log so far.",
    entities=[user],
    schema=[
        Field(name="user_id", dtype=String),
        Field(name="num_events", dtype=Int64),
        Field(name="num_items", dtype=Int64, description="Distinct items."),
        Field(name="num_active_days", dtype=Int64),
        Field(name="last_us", dtype=Int64, description="Last event, microseconds since 1970 UTC."),
        Field(name="top_categories", dtype=Array(String), description="Most frequent first, in words."),
    ],
    source=_source("user_statistics"),
)

user_history = FeatureService(
    name="user_history",
    description="All that the models read of a user.",
    features=[behavior_sequence, user_statistics],
)
