from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from components.config import RecallConfig
from components.exceptions import DataError, UnavailableError
from components.ingestion.schema import EVENTS
from components.recall.events import Event, decode_event
from components.recall.intake import feed, read_events
from components.recall.scripts import STREAM
from tests.components.recall.conftest import make_event
from tests.components.recall.tiny import LAST_EVENT

ROW = {"event_id": "e1", "user_id": "3", "item_id": 1050, "behavior": "purchase", "ts": LAST_EVENT.isoformat()}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        full = [{"scenario": "store", "attributes": [("a", "b")], **row, "ts": LAST_EVENT} for row in rows]
        pq.write_table(pa.Table.from_pylist(full, schema=EVENTS), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_same_events_come_out_of_every_format(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"events{suffix}", [ROW, {**ROW, "event_id": "e2"}])
    events = list(read_events(path, 300))
    assert [event.event_id for event in events] == ["e1", "e2"]
    assert {(event.user_id, event.item_id, event.ts) for event in events} == {("3", 1050, LAST_EVENT)}
    assert len(list(read_events(path, 300, limit=1))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": "x"}, "row 2: expected field 'item_id' to be right .*got 'x'; correct the file"),
        ({"colour": "red"}, "row 2: expected field 'colour'"),
        ({"user_id": ""}, "row 2: expected field 'user_id'"),
        ({"ts": "2999-01-01T00:00:00Z"}, "row 2, field 'ts': expected at most 300 s in the future, got 2999"),
        ({"ts": "2017-01-01"}, "row 2: expected field 'ts'"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write(tmp_path / "events.jsonl", [ROW, {**ROW, **change}])
    with pytest.raises(DataError, match=message):
        list(read_events(path, 300))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: expected readable rows"):
        list(read_events(tmp_path / "absent.csv", 300))
    with pytest.raises(DataError, match=r"expected a \.parquet, \.csv or \.jsonl file, got \.txt"):
        list(read_events(tmp_path / "events.txt", 300))
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"broken\.parquet: expected readable rows"):
        list(read_events(tmp_path / "broken.parquet", 300))


def test_feeding_again_changes_nothing(client: redis.Redis, recall_config: RecallConfig) -> None:
    events = [make_event(event_id=f"e{number}") for number in range(1200)]
    first, second = feed(client, iter(events), recall_config), feed(client, iter(events), recall_config)
    assert (first.accepted, first.duplicates) == (1200, 0)
    assert (second.accepted, second.duplicates) == (0, 1200)
    entries = client.xrange(STREAM)
    assert [decode_event(fields["event"]) for _, fields in entries] == events


def test_full_stream_refuses_and_never_trims(client: redis.Redis) -> None:
    config = RecallConfig(max_stream_length=3)
    events = [make_event(event_id=f"e{number}") for number in range(5)]
    with pytest.raises(UnavailableError, match="event stream: expected room below 3 entries"):
        feed(client, iter(events), config, full_timeout_seconds=0.1)
    assert [decode_event(fields["event"]).event_id for _, fields in client.xrange(STREAM)] == ["e0", "e1", "e2"]
    client.delete(STREAM)  # workers have caught up
    assert feed(client, iter(events), config).accepted == 2


def test_event_needs_an_item_or_words() -> None:
    with pytest.raises(DataError, match="expected item_id or query, or both"):
        decode_event('{"user_id": "3"}')
    assert Event(user_id="3", query="pizza").item_id is None
