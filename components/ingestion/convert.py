"""A source's value in its canonical type; null where it cannot be read.

Item ids are numbers in the canonical tables. An id that is a plain decimal number below 2^62 stays itself; any other
text (a SKU, an ASIN) becomes a number from 2^62 upwards made of its MD5, the same in every run, and the original
stays in `external_id`.
"""

from datetime import UTC, datetime

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir

from components.config import TableSource
from components.exceptions import DataError
from components.ingestion.reading import SCHEMAS, canonical_type
from components.schemas.events import TIMESTAMP
from components.schemas.item_keys import HASHED_FROM

_EXACT_BELOW = 2**53  # of a float; several ids have the same one from there on
_TIMESTAMP = dt.DataType.from_pyarrow(TIMESTAMP)
_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)  # outside: no time of an event
_MICROSECONDS = {"unix_seconds": 1_000_000, "unix_millis": 1_000}


@ibis.udf.scalar.builtin(name="md5_number_lower", signature=((dt.string,), dt.uint64))
def _md5_number(text):  # type: ignore[no-untyped-def]  # ibis takes the types from the signature
    """The lower half of the MD5, by DuckDB."""


@ibis.udf.scalar.builtin(name="make_timestamptz", signature=((dt.int64,), _TIMESTAMP))
def _from_microseconds(microseconds):  # type: ignore[no-untyped-def]  # ibis takes the types from the signature
    """Instant from microseconds since 1970, by DuckDB."""


@ibis.udf.scalar.builtin(name="decode", signature=((dt.binary,), dt.string))
def _decode(content):  # type: ignore[no-untyped-def]  # ibis takes the types from the signature
    """Text of UTF-8, by DuckDB; an error where it is none."""


def decode(value: ir.Value) -> ir.Value:
    """Text that a tool wrote to Parquet without marking it as text; any other value stays as it is."""
    kind = value.type()
    if kind.is_array() and kind.value_type.is_binary():
        return value.map(_decode)
    return _decode(value) if kind.is_binary() else value


def to_canonical(field: str, value: ir.Value, source: TableSource) -> ir.Value:
    """Convert a value of any type to the canonical type of a field.

    Raises:
        DataError: No value of the column's type can stand for the field.
    """
    kind = value.type()
    if kind.is_nested() and not (field == "category" and kind.is_array()):
        raise _wrong_type(field, kind, "a plain value", "map another column")
    if field == "item_id":
        return item_key(value)
    if field in ("user_id", "event_id", "external_id"):
        return id_text(value)
    if field in ("ts", "created_at"):
        return instant(field, value, source.timestamp_format)
    if field == "category":
        return category_path(value, source.category_separator)
    schema = SCHEMAS["items" if field in SCHEMAS["items"].names else "events"]
    return value.cast("string").try_cast(canonical_type(schema, field))


def _wrong_type(field: str, kind: dt.DataType, expected: str, remedy: str) -> DataError:
    return DataError(f"source, column for {field!r}", expected=expected, got=f"type {kind}", remedy=remedy)


def id_text(value: ir.Value) -> ir.StringValue:
    """An id as text; whole numbers that a tool stored as floats lose their ".0", null are those beyond their digits."""
    if value.type().is_floating():
        whole = value.try_cast("int64")
        text = ibis.ifelse(value == whole, whole.cast("string"), value.cast("string"))
        return ibis.ifelse(value.abs() < _EXACT_BELOW, text, ibis.null("string"))
    return value.cast("string")


def item_key(value: ir.Value) -> ir.IntegerValue:
    """An item id as int64, see the module's docstring."""
    text = id_text(value)
    number = text.try_cast("int64")
    plain = (number.cast("string") == text) & (number >= 0) & (number < HASHED_FROM)
    hashed = (_md5_number(text) % HASHED_FROM).cast("int64") + HASHED_FROM
    return ibis.ifelse(text.isnull(), ibis.null("int64"), ibis.ifelse(plain.fill_null(False), number, hashed))


def instant(field: str, value: ir.Value, form: str) -> ir.TimestampValue:
    """A UTC instant from a timestamp, date, ISO text or number; one without a zone is taken as UTC.

    `form` is "timestamp", or "unix_seconds" or "unix_millis" for numbers.

    Raises:
        DataError: The column's type does not go with the form.
    """
    kind = value.type()
    if form == "timestamp":
        if kind.is_numeric():
            raise _wrong_type(field, kind, "timestamps", "set source.timestamp_format to unix_seconds or unix_millis")
        read = value.try_cast(_TIMESTAMP)
        sane = read.between(ibis.literal(_FIRST, _TIMESTAMP), ibis.literal(_LAST, _TIMESTAMP))
        return ibis.ifelse(sane, read, ibis.null(_TIMESTAMP))
    if kind.is_temporal():
        raise _wrong_type(field, kind, "numbers", "set source.timestamp_format to timestamp")
    microseconds = value.try_cast("float64") * _MICROSECONDS[form]
    sane = microseconds.between(0, _LAST.timestamp() * 1e6)
    return _from_microseconds(ibis.ifelse(sane, microseconds.round().try_cast("int64"), ibis.null("int64")))


def category_path(value: ir.Value, separator: str) -> ir.ArrayValue:
    """Category names from the top down without empty ones; no category gives an empty path."""
    if value.type().is_array():
        levels = value.cast("array<string>")
    else:
        levels = value.cast("string").split(separator).map(lambda level: level.strip())
    named = levels.filter(lambda level: level.notnull() & (level != ""))
    return ibis.coalesce(named, ibis.literal([], "array<string>"))


def attributes(values: dict[str, ir.Value]) -> ir.MapValue:
    """Name → text of the values that are there."""
    if not values:
        return ibis.literal({}, "map<string, string>")
    names = ibis.array([ibis.ifelse(value.notnull(), name, ibis.null("string")) for name, value in values.items()])
    texts = ibis.array([value.cast("string") for value in values.values()])
    return ibis.map(*(part.filter(lambda entry: entry.notnull()) for part in (names, texts)))
