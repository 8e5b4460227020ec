import hashlib
from datetime import UTC, datetime
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.config import TableSource
from components.exceptions import DataError
from components.ingestion.convert import attributes, category_path, instant, item_key, to_canonical

NOON = datetime(2024, 5, 6, 12, tzinfo=UTC)


def evaluate(connection: ibis.BaseBackend, values: pa.Array, convert: Any) -> list[Any]:
    table = ibis.memtable(pa.table({"value": values}))
    expression: ir.Value = convert(table.value)
    return connection.to_pyarrow(table.select(out=expression))["out"].to_pylist()  # type: ignore[no-any-return]


def hashed(text: str) -> int:
    """MD5's last eight bytes, little-endian as DuckDB reads them, folded into [2^62, 2^63)."""
    return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little") % 2**62 + 2**62  # noqa: S324  # no secret


def test_item_keys(connection: ibis.BaseBackend) -> None:
    texts = ["17", "0", "017", "-4", "B00X4WHP5E", str(2**62), "", None]
    expected = [17, 0, hashed("017"), hashed("-4"), hashed("B00X4WHP5E"), hashed(str(2**62)), hashed(""), None]
    assert evaluate(connection, pa.array(texts), item_key) == expected


def test_numbers_and_their_text_give_the_same_item(connection: ibis.BaseBackend) -> None:
    assert evaluate(connection, pa.array([5, 2**40], pa.int64()), item_key) == [5, 2**40]
    assert evaluate(connection, pa.array([5.0, None]), item_key) == [5, None]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, unique=True))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_different_ids_stay_different(connection: ibis.BaseBackend, texts: list[str]) -> None:
    keys = evaluate(connection, pa.array(texts), item_key)
    assert len(set(keys)) == len(texts)
    assert all(0 <= key < 2**63 for key in keys)


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (pa.array([NOON.replace(tzinfo=None)], pa.timestamp("ns")), "timestamp"),
        (pa.array([NOON], pa.timestamp("ms", tz="Europe/Berlin")), "timestamp"),
        (pa.array(["2024-05-06 12:00:00"]), "timestamp"),
        (pa.array(["2024-05-06T14:00:00+02:00"]), "timestamp"),
        (pa.array([int(NOON.timestamp())]), "unix_seconds"),
        (pa.array([str(NOON.timestamp())]), "unix_seconds"),
        (pa.array([int(NOON.timestamp() * 1000)]), "unix_millis"),
    ],
)
def test_instants(connection: ibis.BaseBackend, values: pa.Array, form: str) -> None:
    assert evaluate(connection, values, lambda value: instant("ts", value, form)) == [NOON]


@pytest.mark.parametrize(
    ("values", "form"),
    [
        (["yesterday", "2024-13-01", "infinity", "0001-01-01"], "timestamp"),
        (["soon", "-5", "1e30", str(NOON.timestamp() * 1e9)], "unix_seconds"),
    ],
)
def test_no_instants(connection: ibis.BaseBackend, values: list[str], form: str) -> None:
    read = evaluate(connection, pa.array(values), lambda value: instant("ts", value, form))
    assert read == [None] * len(values)


@pytest.mark.parametrize(
    ("value", "form", "message"),
    [
        (1, "timestamp", "set source.timestamp_format to unix_seconds or unix_millis"),
        (NOON, "unix_millis", "set source.timestamp_format to timestamp"),
        ([1], "timestamp", "expected a plain value, got type array"),
    ],
)
def test_types_that_cannot_be_instants(value: object, form: Any, message: str) -> None:
    source = TableSource(events="e", items="i", timestamp_format=form)
    with pytest.raises(DataError, match=message):
        to_canonical("ts", ibis.memtable(pa.table({"value": [value]})).value, source)


def test_category_paths(connection: ibis.BaseBackend) -> None:
    texts = pa.array(["Shoes > Running", "Shoes", " > ", None])
    expected = [["Shoes", "Running"], ["Shoes"], [], []]
    assert evaluate(connection, texts, lambda value: category_path(value, ">")) == expected
    lists = pa.array([["Shoes", None, "Running"], [], None])
    assert evaluate(connection, lists, lambda value: category_path(value, ">")) == [["Shoes", "Running"], [], []]


def test_attributes_without_a_value_are_absent(connection: ibis.BaseBackend) -> None:
    table = ibis.memtable(pa.table({"device": ["phone", None], "price": [2, 3]}))
    both = table.select(out=attributes({"device": table.device, "price": table.price}))
    rows = [dict(row) for row in both.to_pyarrow()["out"].to_pylist()]
    assert rows == [{"device": "phone", "price": "2"}, {"price": "3"}]
    assert table.select(out=attributes({})).to_pyarrow()["out"].to_pylist() == [[], []]
