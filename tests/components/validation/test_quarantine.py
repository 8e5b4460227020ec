"""Property: whatever comes in, accepted and quarantined rows are the input, and accepted rows break no rule."""

import json
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from components.exceptions import DataError

Row = dict[str, Any]
EVENT_FAULTS: list[Row] = [
    {}, {}, {}, {"user_id": ""}, {"user_id": "\t"}, {"behavior": " "}, {"item_id": 8}, {"item_id": 3},
    {"ts": timedelta(days=3)}, {"scenario": "", "item_id": 9}, {"query": "sock", "attributes": None},
]  # fmt: skip
ITEM_FAULTS: list[Row] = [{}, {}, {"title": ""}, {"price": None}, {"price": -0.5}, {"price": 1e7}, {"category": []}]


def accepted_by_hand(events: list[Row], items: list[Row], latest: datetime) -> tuple[list[Row], list[Row]]:
    """The rules in plain Python, the oracle."""
    good_items, seen_items = [], set()
    for row in items:
        priced = row["price"] is None or 0 <= row["price"] <= 1e6
        if row["item_id"] not in seen_items and row["title"].strip() and priced:
            good_items.append(row)
        seen_items.add(row["item_id"])
    known = {row["item_id"] for row in good_items}
    good_events, seen_events = [], set()
    for row in events:
        filled = all(row[name].strip() for name in ("event_id", "user_id", "behavior", "scenario"))
        if row["event_id"] not in seen_events and filled and row["item_id"] in known and row["ts"] <= latest:
            good_events.append(row)
        seen_events.add(row["event_id"])
    return good_events, good_items


def key(row: Row) -> str:
    return json.dumps(row, default=str, sort_keys=True)


@given(
    faulty_events=st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.sampled_from(EVENT_FAULTS)), min_size=1, max_size=30
    ),
    faulty_items=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(ITEM_FAULTS)), min_size=1, max_size=12),
    days=st.integers(1, 4),
)
@settings(
    max_examples=8,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking whole stage runs would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_accepted_and_quarantined_rows_are_the_input(
    bench: Any,
    event: Callable[..., Row],
    item: Callable[..., Row],
    read_rows: Callable[[str], list[Row]],
    now: datetime,
    faulty_events: list[tuple[str, Row]],
    faulty_items: list[tuple[int, Row]],
    days: int,
) -> None:
    events = []
    for position, (event_id, fault) in enumerate(faulty_events):
        row = event(event_id, ts=now - timedelta(days=1 + position % days)) | fault
        if isinstance(row["ts"], timedelta):
            row["ts"] = now + row["ts"]
        events.append(row)
    events.sort(key=lambda row: f"{row['ts']:%Y-%m-%d}")  # files are read in the order of their dates
    items = [item(item_id) | fault for item_id, fault in faulty_items]
    good_events, good_items = accepted_by_hand(events, items, now + timedelta(seconds=300))

    if not good_events or not good_items:
        with pytest.raises(DataError, match="expected at least one accepted row"):
            bench.run(events, items, max_quarantined_share=1.0, min_volume_ratio=0.0)
        return
    result = bench.run(events, items, max_quarantined_share=1.0, min_volume_ratio=0.0)
    quarantined = [json.loads(row["row"]) for row in read_rows(result.outputs["quarantine"])]
    accepted = {table: read_rows(result.outputs[table]) for table in ("events", "items")}
    assert Counter(map(key, accepted["events"])) == Counter(map(key, good_events))
    assert Counter(map(key, accepted["items"])) == Counter(map(key, good_items))
    everything = [*accepted["events"], *accepted["items"], *quarantined]
    assert Counter(map(key, everything)) == Counter(map(key, [*events, *items]))
