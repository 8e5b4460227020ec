import codecs
import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from components.config import RecallConfig
from components.exceptions import DataError, UnavailableError
from components.recall.operate.intake import Refusals, feed, read_events
from components.recall.state.events import Event, decode_event
from components.recall.state.scripts import STREAM
from components.schemas.events import EVENTS
from tests.worlds.recall import make_event
from tests.worlds.tiny import LAST_EVENT

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


def read(path: Path, limit: int | None = None) -> tuple[list[Event], list[str]]:
    """The events of a file, and what is said of rows that are none."""
    said: list[str] = []
    refusals = Refusals(said.append)
    events = list(read_events(path, 300, refusals, limit))
    assert refusals.count >= len(said)
    return events, said


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_same_events_come_out_of_every_format(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"events{suffix}", [ROW, {**ROW, "event_id": "e2"}])
    events, said = read(path)
    assert said == []
    assert [event.event_id for event in events] == ["e1", "e2"]
    assert {(event.user_id, event.item_id, event.ts) for event in events} == {("3", 1050, LAST_EVENT)}
    assert len(read(path, limit=1)[0]) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rows_name_items_by_the_shops_own_ids(
    tmp_path: Path, suffix: str, client: redis.Redis, recall_config: RecallConfig
) -> None:
    row = {name: value for name, value in ROW.items() if name != "item_id"}
    path = write(tmp_path / f"events{suffix}", [{**row, "event_id": sku, "external_id": sku} for sku in ("SKU-1", "7")])
    feed(client, iter(read(path)[0]), recall_config, find={"SKU-1": 1001, "7": 7}.__getitem__)
    assert [decode_event(fields["event"]).item_id for _, fields in client.xrange(STREAM)] == [1001, 7]
    assert read(write(path, [{**ROW, "external_id": "SKU-1"}]))[1][0].count("external_id or item_id, not both") == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_a_byte_order_mark_is_no_part_of_the_first_field(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"events{suffix}", [ROW, {**ROW, "event_id": "e2"}])
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    events, said = read(path)
    assert (said, [event.event_id for event in events]) == ([], ["e1", "e2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"item_id": "x"}, "line 2: expected field 'item_id' to be right .*got 'x'; correct the file"),
        ({"colour": "red"}, "line 2: expected field 'colour'"),
        ({"user_id": ""}, "line 2: expected field 'user_id'"),
        ({"ts": "2200-01-01T00:00:00Z"}, "line 2, field 'ts': expected at most 300 s in the future, got 2200"),
        ({"ts": "1969-12-31T23:59:59Z"}, "line 2: expected field 'ts' to be right .*1970-01-01"),
        ({"ts": "2017-01-01"}, "line 2: expected field 'ts'"),
    ],
)
def test_bad_row_is_named_and_the_others_are_read(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write(tmp_path / "events.jsonl", [ROW, {**ROW, **change}, {**ROW, "event_id": "e3"}])
    events, (sentence,) = read(path)
    assert [event.event_id for event in events] == ["e1", "e3"]
    assert re.search(message, sentence), sentence


def test_rows_without_an_id_are_refused_since_they_would_count_twice(tmp_path: Path) -> None:
    events, (sentence,) = read(write(tmp_path / "events.csv", [ROW, {**ROW, "event_id": ""}]))
    assert len(events) == 1
    assert sentence.endswith("line 3, field 'event_id': expected an id of the event's own, got none; correct the file.")


def test_lines_that_are_no_text_spoil_themselves_alone(tmp_path: Path) -> None:
    good = json.dumps(ROW).encode()
    lines = tmp_path / "events.jsonl"
    lines.write_bytes(b"\xff\xfe{}\n" + b"{\n" + b"\n" + good + b"\n" + b"[1]\n" + b"\x00" * 10)
    events, said = read(lines)
    assert [event.event_id for event in events] == ["e1"]
    assert [re.search("line [0-9]+", sentence)[0] for sentence in said] == ["line 1", "line 2", "line 5", "line 6"]
    rows = tmp_path / "events.csv"
    rows.write_bytes(b"event_id,user_id,item_id\nb\xff,3,1\ne1,3,1,9,9\ne2,3,1\ne3\n")
    events, said = read(rows)
    assert [event.event_id for event in events] == ["e2"]
    assert [re.search("line [0-9]+", sentence)[0] for sentence in said] == ["line 2", "line 3", "line 5"]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: expected readable rows"):
        read(tmp_path / "absent.csv")
    with pytest.raises(DataError, match=r"expected a \.parquet, \.csv or \.jsonl file, got \.txt"):
        read(tmp_path / "events.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match=r"broken\.parquet: expected readable rows"):
        read(tmp_path / "broken.parquet")


def test_feeding_again_changes_nothing(client: redis.Redis, recall_config: RecallConfig) -> None:
    events = [make_event(str(number % 2), event_id=f"e{number}") for number in range(1200)]
    first, second = feed(client, iter(events), recall_config), feed(client, iter(events), recall_config)
    assert (first.accepted, first.duplicates) == (1200, 0)
    assert (second.accepted, second.duplicates) == (0, 1200)
    entries = client.xrange(STREAM)
    assert [decode_event(fields["event"]) for _, fields in entries] == events


def test_full_stream_refuses_and_never_trims(client: redis.Redis) -> None:
    config = RecallConfig(max_stream_length=3)
    events = [make_event(event_id=f"e{number}") for number in range(5)]
    with pytest.raises(UnavailableError, match="event stream: expected room below 3 entries, and 1000 per user"):
        feed(client, iter(events), config, full_timeout_seconds=0.1)
    assert [decode_event(fields["event"]).event_id for _, fields in client.xrange(STREAM)] == ["e0", "e1", "e2"]
    client.delete(STREAM)  # workers have caught up
    assert feed(client, iter(events), config).accepted == 2


def test_too_many_events_of_a_user_wait_for_room_and_keep_their_order(client: redis.Redis) -> None:
    config = RecallConfig(max_waiting_per_user=3)
    events = [make_event("bot", event_id=f"e{number}") for number in range(5)]
    with pytest.raises(UnavailableError, match="and 3 per user, got none, and it does not shrink"):
        feed(client, iter([*events, make_event("other", event_id="of another")]), config, full_timeout_seconds=0.1)
    kept = [decode_event(fields["event"]).event_id for _, fields in client.xrange(STREAM)]
    assert kept == ["e0", "e1", "e2", "of another"]


def test_event_needs_an_item_or_words() -> None:
    with pytest.raises(DataError, match="expected external_id, item_id or query"):
        decode_event('{"user_id": "3"}')
    assert Event(user_id="3", query="pizza").item_id is None
