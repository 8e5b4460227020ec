"""Adapter for the user's own logs: Parquet or CSV files, with a map from canonical columns to theirs.

CSV values are read as text, so that a value of the wrong type is found and shown, not guessed around.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import ibis
import ibis.expr.types as ir

from components.config import TableSource
from components.exceptions import ConfigError, DataError
from components.ingestion import convert
from components.ingestion.files import find_files, open_found
from components.ingestion.ragged import SEPARATORS, find_ragged_row
from components.ingestion.reading import SCHEMAS, Column, Log, Reading, canonical_type

REQUIRED = {"events": ("user_id", "item_id", "behavior", "scenario", "ts"), "items": ("item_id", "title")}
_PARQUET = "read_parquet({}, union_by_name = true)"
_CSV = "read_csv({}, all_varchar = true, union_by_name = true)"
EVENT_ID = "_event_id"  # made where the log has none
_REMEDY = {
    "events": "map them in source.event_columns or give constants in source.event_defaults",
    "items": "map them in source.item_columns",
}


def read_events(source: TableSource, connection: ibis.BaseBackend) -> Reading:
    """The user's events; an event_id is made of user, item, behaviour and time where the log has none.

    Raises:
        ConfigError: The column map names an unknown canonical column.
        DataError: No file matches, a column is missing (one sentence names all), or its type cannot be read.
    """
    _check_names("events", [*source.event_columns, *source.event_defaults])
    return _event_reading(source, open_files("events", source.events, connection))


def _event_reading(source: TableSource, rows: ir.Table) -> Reading:
    mapping, defaults, raw = source.event_columns, source.event_defaults, rows
    names = _column_names("events", source.events, raw, mapping, defaults, source.attributes)
    if "event_id" not in names and "event_id" not in defaults:
        raw = _with_event_id(rows, names, source.attributes)
        names["event_id"] = EVENT_ID
    columns = [
        _column(field, names, raw, defaults, source) for field in SCHEMAS["events"].names if field != "attributes"
    ]
    kept = convert.attributes({name: convert.decode(raw[name]) for name in source.attributes})
    columns.append(Column("attributes", ", ".join(source.attributes) or "none", kept, kept))
    log = Log(rows, _column("ts", names, rows, defaults, source).typed, partial(_event_reading, source))
    return Reading("events", source.events, raw, tuple(columns), log)


def read_items(source: TableSource, connection: ibis.BaseBackend) -> Reading:
    """The user's items; without a column of their own, external_id is the id and every item is available.

    Raises:
        ConfigError: The column map names an unknown canonical column.
        DataError: As for `read_events`.
    """
    return item_reading(source, open_files("items", source.items, connection))


def item_reading(source: TableSource, raw: ir.Table) -> Reading:
    """`read_items` for a table that is open."""
    mapping = source.item_columns
    _check_names("items", mapping)
    names = _column_names("items", source.items, raw, mapping, {}, [])
    names.setdefault("external_id", names["item_id"])
    defaults = {"available": "true"}
    columns = tuple(_column(field, names, raw, defaults, source) for field in SCHEMAS["items"].names)
    return Reading("items", source.items, raw, columns)


def _column(field: str, names: dict[str, str], raw: ir.Table, defaults: dict[str, str], source: TableSource) -> Column:
    schema = SCHEMAS["items" if field in SCHEMAS["items"].names else "events"]
    if field in names:
        value = convert.decode(raw[names[field]])
        origin = "made of user, item, ts" if names[field] == EVENT_ID else names[field]
        if value.type().is_floating():
            value = value.isnan().ifelse(ibis.null(value.type()), value)  # how NumPy writes that there is none
        if field == "brand":
            value = value.cast("string").strip().nullif("")  # else it would be a brand that many items share
        if field in defaults:
            value = value.cast("string").fill_null(defaults[field])
    elif field in defaults:
        value, origin = ibis.literal(defaults[field]), f"constant {defaults[field]!r}"
    else:
        absent = ibis.literal([] if field == "category" else None, canonical_type(schema, field))
        return Column(field, "none", absent, absent)
    required = not schema.field(field).nullable and field != "category"  # no category is an empty path
    return Column(field, origin, value, convert.to_canonical(field, value, source), required)


def _check_names(table: str, names: Iterable[str]) -> None:
    known = [name for name in SCHEMAS[table].names if name != "attributes"]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"source.{table.removesuffix('s')}_columns, key {name!r}",
                expected=f"one of {', '.join(known)}",
                got="an unknown canonical column",
                remedy="keep other columns of the log by naming them in source.attributes",
            )


def open_files(table: str, pattern: str, connection: ibis.BaseBackend) -> ir.Table:
    """The rows of all files that match, Parquet or CSV.

    Raises:
        DataError: No file matches, or files of both kinds do.
        UnavailableError: The object store does not answer.
    """
    filesystem, paths = find_files(table, pattern)
    csv = [".csv" in found.rsplit("/", 1)[-1].lower() for found in paths]
    if len(set(csv)) > 1:
        raise DataError(
            f"source.{table} {pattern}",
            expected="files of one kind",
            got=f"CSV, {paths[csv.index(True)]}, and others, {paths[csv.index(False)]}",
            remedy="name one kind, as in *.parquet",
        )
    return open_found(connection, filesystem, paths, f"raw_{table}", _CSV if csv[0] else _PARQUET)


def _column_names(
    table: str, pattern: str, raw: ir.Table, mapping: dict[str, str], defaults: dict[str, str], attributes: list[str]
) -> dict[str, str]:
    """Canonical name → column of the log, for those the log has."""
    wanted: dict[str, str] = {name: mapping.get(name, name) for name in SCHEMAS[table].names if name != "attributes"}
    names = {name: column for name, column in wanted.items() if column in raw.columns}
    needed = [name for name in wanted if name in mapping or (name in REQUIRED[table] and name not in defaults)]
    missing = [wanted[name] if name in mapping else name for name in needed if name not in names]
    missing += [column for column in attributes if column not in raw.columns]
    # One row of another length, and DuckDB finds no separator in that file: its header is one column.
    unsplit = [column for column in raw.columns if set(column) & set(SEPARATORS)]
    ragged = find_ragged_row(table, pattern) if unsplit else ""
    if ragged or (missing and unsplit and len(raw.columns) == 1):
        raise DataError(
            f"source.{table} {pattern}",
            expected="rows with as many fields as the header",
            got=ragged or f"a header that cannot be split, {unsplit[0]}",
            remedy="look for a row with a separator too many or too few, and quote values that have one",
        )
    if missing:
        raise DataError(
            f"source.{table} {pattern}",
            expected=f"column(s) {', '.join(missing)}",
            got=f"only {', '.join(raw.columns)}",
            remedy=_REMEDY[table],
        )
    return names


def _with_event_id(raw: ir.Table, names: dict[str, str], attributes: list[str]) -> ir.Table:
    """Add an id that is the same in every run; a running number keeps otherwise equal events apart."""
    keys = [names[field] for field in ("user_id", "item_id", "behavior", "ts") if field in names]
    key = ibis.literal("|").join([raw[name].cast("string").fill_null("") for name in keys]).hexdigest("md5")
    order: Any = [*attributes, *(names[field] for field in ("scenario", "query") if field in names)] or None
    numbered = raw.mutate(_repeat=ibis.row_number().over(group_by=keys, order_by=order), **{EVENT_ID: key})
    return numbered.mutate(**{EVENT_ID: numbered[EVENT_ID] + "-" + numbered._repeat.cast("string")})
