import gzip
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import SEQUENCE_LAST_DAY, RunConfig, SequenceSource
from components.exceptions import DataError
from components.ingestion.check import check_source
from components.ingestion.files import fingerprint_files
from components.ingestion.sequences import read_events, read_items
from components.settings import Settings
from components.stages.ingest import run
from components.storage import run_stage
from tests.worlds import PUBLIC_DATA

ITEMS = [
    {"item_id": 1, "asin": "B1", "title": "Soap", "brand": "Clean", "categories": ["Care", "Soap"], "phrase": "a"},
    {"item_id": 2, "asin": "B2", "title": None, "brand": "Unknown", "categories": [], "phrase": "bar of soap"},
    {"item_id": 3, "asin": "B3", "title": "", "brand": None, "categories": ["Care"], "phrase": "lotion"},
]


def write_source(folder: Path, lines: str, **fields: Any) -> SequenceSource:
    (folder / "sequences.txt.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.Table.from_pylist(ITEMS), folder / "items.parquet")
    return SequenceSource(data_dir=str(folder), **fields)


def events_of(source: SequenceSource, connection: ibis.BaseBackend) -> list[tuple[str, str, int, int]]:
    """event_id, user_id, item_id, and days before the last day."""
    rows = read_events(source, connection).readable().order_by("event_id").to_pyarrow().to_pylist()
    assert {(row["behavior"], row["scenario"], row["query"]) for row in rows} == {("purchase", "store", None)}
    day = timedelta(days=1)
    assert all((SEQUENCE_LAST_DAY - row["ts"]) % day == timedelta(0) for row in rows)
    return [(row["event_id"], row["user_id"], row["item_id"], (SEQUENCE_LAST_DAY - row["ts"]) // day) for row in rows]


def rejected_of(source: SequenceSource, connection: ibis.BaseBackend) -> list[tuple[int, str]]:
    rows = read_events(source, connection).rejected().order_by("line", "place").to_pyarrow().to_pylist()
    return [(row["line"], row["_reason"]) for row in rows]


@pytest.mark.parametrize("name", ["sequences.txt.gz", "sequences.txt"])
def test_a_line_is_a_user_with_a_purchase_per_day(name: str, connection: ibis.BaseBackend, tmp_path: Path) -> None:
    lines = "7 1 2 3\n8 3\n"
    source = write_source(tmp_path, lines, sequences=name)
    (tmp_path / "sequences.txt").write_text(lines)
    of_seven = [("7-1", "7", 1, 2), ("7-2", "7", 2, 1), ("7-3", "7", 3, 0)]
    assert events_of(source, connection) == [*of_seven, ("8-1", "8", 3, 0)]


def test_blank_lines_and_wide_gaps_do_no_harm(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    source = write_source(tmp_path, '\n  7\t1   2 \r\n\n   \n"8" 3\n\n')
    expected = [('"8"-1', '"8"', 3), ("7-1", "7", 1), ("7-2", "7", 2)]
    assert [event[:3] for event in events_of(source, connection)] == expected
    assert rejected_of(source, connection) == []


def test_the_first_lines_only(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    source = write_source(tmp_path, "9 1\n7 1 2\n8 3\n", max_users=2)
    assert {event[1] for event in events_of(source, connection)} == {"9", "7"}


def test_a_line_without_items_and_a_users_second_line_are_refused(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    source = write_source(tmp_path, "7 1 2\n8\n7 3 1\n")
    assert [event[0] for event in events_of(source, connection)] == ["7-1", "7-2"]
    assert rejected_of(source, connection) == [(2, "missing_item_id")] + [(3, "unreadable_user_id")] * 2


def test_days_do_not_reach_back_before_1970(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    days = SEQUENCE_LAST_DAY.timestamp() / 86_400
    source = write_source(tmp_path, "7" + " 1" * round(days + 3) + "\n")
    assert rejected_of(source, connection) == [(1, "unreadable_ts")] * 2


def test_text_ids_stand_for_the_same_item_in_both_files(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    columns = {"item_id": "asin", "title": "phrase"}
    source = write_source(tmp_path, "A1 B2 B1\n", item_columns=columns)
    items = {row["external_id"]: row for row in read_items(source, connection).readable().to_pyarrow().to_pylist()}
    assert [event[2] for event in events_of(source, connection)] == [items["B2"]["item_id"], items["B1"]["item_id"]]
    assert items["B3"]["brand"] is None
    assert items["B3"]["category"] == []


def test_items(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    source = write_source(tmp_path, "7 1\n", title_fallback="phrase")
    rows = read_items(source, connection).readable().order_by("item_id").to_pyarrow().to_pylist()
    wanted = ("external_id", "title", "brand", "category")
    assert [tuple(row[name] for name in wanted) for row in rows] == [
        ("B1", "Soap", "Clean", ["Care", "Soap"]),
        ("B2", "bar of soap", None, []),
        ("B3", "lotion", None, ["Care"]),
    ]


def test_columns_with_the_canonical_names_need_no_entry(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    columns = {"external_id": "asin", "category": "categories"}
    source = write_source(tmp_path, "7 1\n", title_fallback="phrase", item_columns=columns)
    rows = read_items(source, connection).readable().order_by("item_id").to_pyarrow().to_pylist()
    found = [(row["title"], row["brand"]) for row in rows]
    assert found == [("Soap", "Clean"), ("bar of soap", None), ("lotion", None)]


def test_an_item_without_a_title_is_refused(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    rows = read_items(write_source(tmp_path, "7 1\n"), connection).rejected().to_pyarrow().to_pylist()
    assert [(row["item_id"], row["_reason"]) for row in rows] == [(2, "missing_title")]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"title_fallback": "name"}, r"items\.parquet: expected column name, got only item_id, .*title_fallback"),
        ({"item_columns": {"title": "titel"}}, r"column\(s\) titel, got only .*map them in source\.item_columns"),
        ({"items": "goods.parquet"}, r"source\.items .*goods\.parquet: expected at least one file, .*source\.data_dir"),
    ],
)
def test_missing_items(fields: dict[str, Any], message: str, connection: ibis.BaseBackend, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read_items(write_source(tmp_path, "7 1\n", **fields), connection)


def test_missing_sequences(connection: ibis.BaseBackend, tmp_path: Path) -> None:
    source = SequenceSource(data_dir=str(tmp_path / "none"))
    message = r"source\.sequences .*none/sequences\.txt\.gz: expected at least one file, got none; set source\.data_dir"
    with pytest.raises(DataError, match=message):
        read_events(source, connection)
    with pytest.raises(DataError, match=message):
        fingerprint_files(source)
    assert re.search(message, check_source(source, Settings()).text)


def test_another_file_is_another_fingerprint(tmp_path: Path) -> None:
    first = fingerprint_files(write_source(tmp_path, "7 1\n"))
    assert fingerprint_files(write_source(tmp_path, "7 1 2 3 1 2 3 1 2 3\n")) != first


def test_the_stage_and_its_quarantine(configure: Callable[..., RunConfig], settings: Settings, tmp_path: Path) -> None:
    source = write_source(tmp_path, "7 1 2\n8\n7 3 1\n", title_fallback="phrase")
    result = run_stage("ingest", run, config=configure(source), run_dir=str(tmp_path / "runs/one"), settings=settings)
    assert result.counts == {"events": 2, "users": 1, "items": 3, "rejected": 3}
    rejected = pq.read_table(result.outputs["rejected"]).to_pylist()
    message = "user_id cannot be read from user = '7 (a second line)'"
    assert {row["message"] for row in rejected} == {"item_id is missing", message}
    assert not check_source(source, Settings()).passed
    assert check_source(source.model_copy(update={"max_users": 1}), Settings()).passed


@pytest.mark.skipif(not (PUBLIC_DATA / "amazon_beauty").is_dir(), reason="the public files are not on this machine")
def test_the_public_beauty_file(connection: ibis.BaseBackend) -> None:
    source = SequenceSource(data_dir=str(PUBLIC_DATA / "amazon_beauty"), title_fallback="phrase")
    reading = read_events(source, connection)
    events = reading.readable().to_pandas()
    assert (len(events), events.user_id.nunique(), events.item_id.nunique()) == (198_502, 22_363, 12_101)
    assert events[events.ts == SEQUENCE_LAST_DAY].user_id.nunique() == 22_363
    assert reading.rejected().count().execute() == 0
    items = read_items(source, connection).readable().to_pandas()
    assert len(items) == 12_101
    assert (items.title != "").all()
