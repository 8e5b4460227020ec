from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import ibis
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from components.config import TableSource
from components.exceptions import ConfigError, DataError, UnavailableError
from components.ingestion.files import fingerprint_files
from components.ingestion.sources import readable_errors
from components.ingestion.tables import read_events, read_items
from components.ingestion.write import write_items
from components.schemas.events import EVENTS, ITEMS

LOG = pa.table(
    {
        "customer": ["anna", "ben", "anna"],
        "sku": ["B00X", "17", "B00X"],
        "action": ["view", "purchase", "view"],
        "at": ["2024-05-06 12:00:00", "2024-05-06T14:00:00+02:00", "2024-05-07"],
        "device": ["phone", None, "desk"],
    }
)
GOODS = pa.table(
    {
        "sku": ["B00X", "17"],
        "name": ["Running shoe", "Sock"],
        "path": ["Shoes > Running", None],
        "price": ["59.90", None],
        "available": ["true", "false"],
    }
)
MAPS: dict[str, Any] = {
    "event_columns": {"user_id": "customer", "item_id": "sku", "behavior": "action", "ts": "at"},
    "event_defaults": {"scenario": "web"},
    "item_columns": {"item_id": "sku", "title": "name", "category": "path"},
    "attributes": ["device"],
}
NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)


def write(table: pa.Table, path: Path) -> str:
    if path.suffix == ".csv":
        pa.csv.write_csv(table, path)
    else:
        pq.write_table(table, path)
    return str(path)


def read(events: str, items: str, connection: ibis.BaseBackend, **maps: Any) -> tuple[pa.Table, pa.Table]:
    source = TableSource(events=events, items=items, **(MAPS | maps))
    readings = (read_events(source, connection), EVENTS), (read_items(source, connection), ITEMS)
    return tuple(reading.readable().to_pyarrow().cast(schema) for reading, schema in readings)


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_columns_are_mapped(suffix: str, tmp_path: Path, connection: ibis.BaseBackend) -> None:
    events, items = read(write(LOG, tmp_path / f"log{suffix}"), write(GOODS, tmp_path / f"goods{suffix}"), connection)
    rows = sorted(events.to_pylist(), key=lambda row: (row["ts"], row["user_id"]))
    shoe = next(row["item_id"] for row in items.to_pylist() if row["external_id"] == "B00X")
    assert [(row["user_id"], row["item_id"], row["ts"]) for row in rows] == [
        ("anna", shoe, NOON),
        ("ben", 17, NOON),
        ("anna", shoe, datetime(2024, 5, 7, tzinfo=UTC)),
    ]
    assert [dict(row["attributes"]) for row in rows] == [{"device": "phone"}, {}, {"device": "desk"}]
    assert {row["scenario"] for row in rows} == {"web"}
    assert {row["query"] for row in rows} == {None}
    by_id = {row["external_id"]: row for row in items.to_pylist()}
    assert by_id["B00X"]["category"] == ["Shoes", "Running"]
    assert by_id["B00X"]["price"] == 59.9
    assert by_id["17"] == {
        "item_id": 17, "external_id": "17", "title": "Sock", "category": [], "brand": None, "price": None,
        "image_uri": None, "created_at": None, "available": False,
    }  # fmt: skip


def test_a_null_is_refused_where_needed_and_filled_by_a_default(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    log = LOG.append_column("event_id", pa.array(["a", None, "c"]))
    log = log.append_column("scenario", pa.array(["app", "app", None]))
    goods = GOODS.set_column(4, "available", pa.array([None, "false"]))
    events, items = read(write(log, tmp_path / "log.parquet"), write(goods, tmp_path / "goods.parquet"), connection)
    assert {row["event_id"]: row["scenario"] for row in events.to_pylist()} == {"a": "app", "c": "web"}
    assert {row["external_id"]: row["available"] for row in items.to_pylist()} == {"B00X": True, "17": False}


def test_made_event_ids_are_unique_and_the_same_in_every_run(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    twice = write(pa.concat_tables([LOG, LOG]), tmp_path / "log.parquet")
    once = write(LOG, tmp_path / "once.parquet")
    goods = write(GOODS, tmp_path / "goods.parquet")
    ids = read(twice, goods, connection)[0]["event_id"].to_pylist()
    assert len(set(ids)) == len(ids) == 6
    assert set(read(once, goods, connection)[0]["event_id"].to_pylist()) < set(ids)


def test_made_event_ids_do_not_depend_on_the_order_of_rows(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    """Events that differ in their scenario alone."""
    log = pa.concat_tables([LOG, LOG]).append_column("scenario", pa.array(["app"] * 3 + ["web"] * 3))
    goods, found = write(GOODS, tmp_path / "goods.parquet"), []
    for name, rows in (("log", log), ("reversed", log.take(list(range(6))[::-1]))):
        events = read(write(rows, tmp_path / f"{name}.parquet"), goods, connection)[0]
        found.append(dict(zip(events["event_id"].to_pylist(), events["scenario"].to_pylist(), strict=True)))
    assert found[0] == found[1]
    assert len(found[0]) == 6


def test_ids_beyond_the_digits_of_a_float_are_refused(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    """One file with an empty id makes floats of those in all files, and of two customers one."""
    ids = [1234567890123456789, 1234567890123456790, 5]
    for name, customers in (("log1", pa.array(ids)), ("log2", pa.array([2.0**53 - 1, None, float("inf")]))):
        write(LOG.set_column(0, "customer", customers), tmp_path / f"{name}.parquet")
    source = TableSource(events=str(tmp_path / "log*.parquet"), items=write(GOODS, tmp_path / "goods.parquet"), **MAPS)
    reading = read_events(source, connection)
    assert sorted(reading.readable().user_id.to_pyarrow().to_pylist()) == ["5", "9007199254740991"]
    reasons = sorted(reading.rejected()._reason.to_pyarrow().to_pylist())
    assert reasons == ["missing_user_id"] + ["unreadable_user_id"] * 3


def test_text_that_is_not_marked_as_such_is_read_as_utf_8(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    log = LOG.set_column(0, "customer", pa.array(["zoë".encode(), b"ben", b"ben"]))
    log = log.set_column(4, "device", pa.array(["téléphone".encode(), None, b"desk"]))
    log = log.append_column("picture", pa.array([b"\xff\xd8"] * 3))  # no text, and not asked for
    goods = GOODS.set_column(1, "name", pa.array(["Café".encode(), b"Sock"]))
    goods = goods.set_column(2, "path", pa.array([["Gläser".encode()], None]))
    places = write(log, tmp_path / "log.parquet"), write(goods, tmp_path / "goods.parquet")
    events, items = read(*places, connection)
    assert set(events["user_id"].to_pylist()) == {"zoë", "ben"}
    assert ("device", "téléphone") in [pair for pairs in events["attributes"].to_pylist() for pair in pairs]
    assert {(row["title"], *row["category"]) for row in items.to_pylist()} == {("Café", "Gläser"), ("Sock",)}
    broken = write(GOODS.set_column(1, "name", pa.array([b"\xff\xfe", b"Sock"])), tmp_path / "broken.parquet")
    source = TableSource(events=places[0], items=broken, **MAPS)
    with pytest.raises(DataError, match="invalid UTF8"), readable_errors(source):
        read_items(source, connection).readable().to_pyarrow()


def test_several_files_and_a_remote_store(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    memory = fsspec.filesystem("memory")
    for number in (1, 2):
        with memory.open(f"/shop/log-{number}.parquet", "wb") as stream:
            pq.write_table(LOG, stream)
    events, _ = read("memory://shop/log-*.parquet", write(GOODS, tmp_path / "goods.parquet"), connection)
    memory.rm("/shop", recursive=True)
    assert events.num_rows == 6


@pytest.mark.parametrize("suffix", [".parquet", ".csv"])
def test_an_object_store_needs_no_extension(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The protocol is s3, for which Ibis would download one; there is no network in DuckDB here."""

    class Bucket(LocalFileSystem):
        protocol = "s3"

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return str(super()._strip_protocol(path.removeprefix("s3://")))

        def unstrip_protocol(self, name: str) -> str:
            return f"s3://{name}"

    fsspec.register_implementation("s3", Bucket, clobber=True)
    connection = ibis.duckdb.connect(extension_directory=str(tmp_path / "none"), autoinstall_known_extensions=False)
    monkeypatch.setattr(type(connection), "_load_extensions", lambda *_, **__: pytest.fail("asks for an extension"))
    log, goods = (write(table, tmp_path / f"{name}{suffix}") for name, table in (("log", LOG), ("goods", GOODS)))
    try:
        events, _ = read(f"s3://{log}", f"s3://{goods}", connection)
    finally:
        fsspec.register_implementation("s3", "s3fs.S3FileSystem", clobber=True)
        connection.disconnect()
    assert events.num_rows == 3


def test_of_two_rows_of_one_item_the_earlier_one_comes_first(tmp_path: Path) -> None:
    number, twice = 200_000, 2_000
    ids = np.concatenate([np.arange(number), np.arange(twice) * 7])
    goods = pa.table({"sku": ids, "name": [f"row {row}" for row in range(len(ids))]})
    maps = {**MAPS, "item_columns": {"item_id": "sku", "title": "name"}}
    source = TableSource(events="none", items=write(goods, tmp_path / "goods.parquet"), **maps)
    connection = ibis.duckdb.connect(threads=2)
    assert write_items(read_items(source, connection), tmp_path / "items.parquet", lambda *_, **__: None) == len(ids)
    items = pq.read_table(tmp_path / "items.parquet")
    rows = np.array([int(title.split()[1]) for title in items["title"].to_pylist()])
    same = np.diff(items["item_id"].to_numpy()) == 0
    assert same.sum() == twice
    assert (np.diff(rows)[same] > 0).all()


def test_numbers_that_are_none_and_empty_brands_are_absent(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    log = LOG.set_column(0, "customer", pa.array([7.0, float("nan"), None]))
    goods = GOODS.append_column("brand", pa.array([" ", "Acme "])).set_column(3, "price", pa.array([float("nan"), 2.5]))
    maps = {"events": write(log, tmp_path / "log.parquet"), "items": write(goods, tmp_path / "goods.parquet"), **MAPS}
    reading = read_events(TableSource(**maps), connection)
    assert reading.readable().user_id.to_pyarrow().to_pylist() == ["7"]
    assert reading.rejected()._reason.to_pyarrow().to_pylist() == ["missing_user_id"] * 2
    items = {
        row["external_id"]: row
        for row in read_items(TableSource(**maps), connection).readable().to_pyarrow().to_pylist()
    }
    assert (items["B00X"]["brand"], items["B00X"]["price"]) == (None, None)
    assert (items["17"]["brand"], items["17"]["price"]) == ("Acme", 2.5)


def test_rows_that_do_not_fit_are_set_aside(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    bad = LOG.set_column(0, "customer", pa.array(["ann", None, "cid"])).set_column(1, "sku", pa.array(["1", "2", "3"]))
    bad = bad.set_column(3, "at", pa.array(["2024-05-06", "2024-05-06", "yesterday"]))
    source = TableSource(events=write(bad, tmp_path / "log.csv"), items=write(GOODS, tmp_path / "goods.csv"), **MAPS)
    reading = read_events(source, connection)
    assert reading.readable().user_id.to_pyarrow().to_pylist() == ["ann"]
    rejected = reading.rejected().to_pyarrow().to_pylist()
    assert {row["sku"]: row["_reason"] for row in rejected} == {"2": "missing_user_id", "3": "unreadable_ts"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"event_columns": {"user_id": "who", "ts": "when"}}, DataError, r"column\(s\) who, item_id, behavior, when"),
        ({"attributes": ["mood"]}, DataError, r"column\(s\) mood, got only customer, sku, action, at, device"),
        ({"event_defaults": {}}, DataError, r"column\(s\) scenario, .* or give constants in source.event_defaults"),
        ({"item_columns": {"item_id": "sku"}}, DataError, r"column\(s\) title, .* map them in source.item_columns"),
        ({"item_columns": {"titel": "name"}}, ConfigError, "key 'titel': expected one of item_id, external_id"),
        ({"timestamp_format": "unix_seconds"}, None, ""),
    ],
)
def test_mistakes_in_the_map(
    change: dict[str, Any], error: type[Exception] | None, message: str, tmp_path: Path, connection: ibis.BaseBackend
) -> None:
    log, goods = write(LOG, tmp_path / "log.parquet"), write(GOODS, tmp_path / "goods.parquet")
    if error is None:  # text that is no number: every row is set aside, none is guessed at
        assert read(log, goods, connection, **change)[0].num_rows == 0
        return
    with pytest.raises(error, match=message):
        read(log, goods, connection, **change)


def test_no_file(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    with pytest.raises(DataError, match=r"no-such-\*\.csv: expected at least one file, got none"):
        read(str(tmp_path / "no-such-*.csv"), "x", connection)
    with pytest.raises(DataError, match="expected a path or glob that can be listed"):
        read("nowhere://bucket/log.csv", "x", connection)


def test_a_folder_an_empty_pattern_and_files_of_two_kinds_are_refused(
    tmp_path: Path, connection: ibis.BaseBackend
) -> None:
    """DuckDB would read what lies in a folder, and nothing would tell that it changed."""
    log = write(LOG, tmp_path / "log.parquet")
    write(LOG, tmp_path / "log.csv")
    with pytest.raises(
        DataError, match=rf"expected files, got a folder, {tmp_path}; name its files, as in .*/\*\.parquet"
    ):
        read(str(tmp_path), "x", connection)
    with pytest.raises(DataError, match=r"source\.events : expected at least one file, got none"):
        read("", "x", connection)
    with pytest.raises(DataError, match=r"expected files of one kind, got CSV, .*log\.csv, and others, .*log\.parquet"):
        read(str(tmp_path / "log.*"), log, connection)


def test_the_case_of_a_name_does_not_matter(tmp_path: Path, connection: ibis.BaseBackend) -> None:
    write(LOG, tmp_path / "log.csv")
    (tmp_path / "log.csv").rename(tmp_path / "LOG.CSV")
    assert read(str(tmp_path / "LOG.CSV"), write(GOODS, tmp_path / "goods.parquet"), connection)[0].num_rows == 3


@pytest.mark.parametrize("separator", [",", ";"])
def test_a_row_with_a_field_too_many_is_no_matter_of_the_map(
    separator: str, tmp_path: Path, connection: ibis.BaseBackend
) -> None:
    rows = [["sku", "name"], *([str(number), "Sock"] for number in range(3000))]
    rows[100].append("of wool")
    (tmp_path / "goods.csv").write_text("\n".join(separator.join(row) for row in rows))
    sentence = r"as many fields as the header, got .*/goods\.csv, line 101: 3 fields where the header has 2; look"
    with pytest.raises(DataError, match=sentence):
        read(write(LOG, tmp_path / "log.parquet"), str(tmp_path / "goods.csv"), connection)


def test_a_store_that_does_not_answer(
    tmp_path: Path, connection: ibis.BaseBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoCredentialsError(Exception):
        """Of no kind that Python has, as botocore's."""

    def fail(*_: object, **__: object) -> None:
        raise NoCredentialsError("Unable to locate credentials")

    for name in ("log", "goods"):
        with fsspec.open(f"memory://down/{name}.parquet", "wb") as stream:
            pq.write_table(LOG, stream)
    source = TableSource(events="memory://down/log.parquet", items="memory://down/goods.parquet")
    with monkeypatch.context() as broken:
        broken.setattr(MemoryFileSystem, "glob", fail)
        with pytest.raises(
            UnavailableError, match=r"object store of memory://down/log.parquet: expected an answer, got Unab"
        ):
            read(source.events, "x", connection)
    monkeypatch.setattr(MemoryFileSystem, "ukey", fail)
    with pytest.raises(UnavailableError, match="Unable to locate credentials; correct its address or credentials"):
        fingerprint_files(source)
