"""Adapter for public sequence files, the form of the Amazon benchmarks: one line per user, `user item item ...`.

Decisions, each a property of this form:

- Every event is a purchase in the scenario "store"; there is nothing else in the files.
- There are no times, only an order, oldest first. Days are made up, counted back from the end: see
  `SEQUENCE_LAST_DAY`. So the last events of all users share one day, whatever the lengths of their sequences.
- A user has one line. A second one cannot be put in order with the first and is refused.
- The brand "Unknown" is how these catalogues write that there is none.
"""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import SEQUENCE_LAST_DAY, SequenceSource, TableSource
from components.exceptions import DataError
from components.ingestion import convert, tables
from components.ingestion.files import PUBLIC_FILES_REMEDY, find_files, open_found
from components.ingestion.reading import Column, Reading, canonical_type
from components.schemas.events import EVENTS

_NO_BRAND = "unknown"
# No text has \x1f, so that a line is one field; line ends may be mixed.
_LINES = (
    "read_csv({}, columns = {'text': 'VARCHAR'}, header = false, delim = '\x1f', quote = '', escape = '', "
    "strict_mode = false)"
)
_SECONDS_A_DAY = 86_400


def read_events(source: SequenceSource, connection: ibis.BaseBackend) -> Reading:
    """One purchase per item of a line; `event_id` is user and place, from 1.

    Raises:
        DataError: There is no such file.
    """
    lines = connection.create_table("sequence_lines", _open_lines(source, connection), temp=True, overwrite=True)
    raw = _events(lines)
    event_id = raw.user + "-" + raw.place.cast("string")
    seconds = round(SEQUENCE_LAST_DAY.timestamp()) - (raw.length - raw.place) * _SECONDS_A_DAY
    values: dict[str, tuple[str, ir.Value, ir.Value]] = {
        "event_id": ("user and place", event_id, event_id),
        "user_id": ("user", raw.user, ibis.ifelse(raw.is_repeated, ibis.null("string"), raw.user)),
        "item_id": ("item", raw["item"], convert.item_key(raw["item"])),
        "ts": ("place", raw.place, convert.instant("ts", seconds, "unix_seconds")),
    }
    for name, text in (("behavior", "purchase"), ("scenario", "store")):
        values[name] = ("constant", ibis.literal(text), ibis.literal(text))
    columns = []
    for field in EVENTS:
        absent = ibis.null(canonical_type(EVENTS, field.name))
        origin, value, typed = values.get(field.name, ("none", absent, absent))
        columns.append(Column(field.name, origin, value, typed, required=not field.nullable))
    return Reading("events", source.sequences_path, raw, tuple(columns))


def read_items(source: SequenceSource, connection: ibis.BaseBackend) -> Reading:
    """The items; one without a title has that of `title_fallback`.

    Raises:
        ConfigError: The column map names an unknown canonical column.
        DataError: There is no such file, or it lacks a column of the configuration.
    """
    find_files("items", source.items_path, PUBLIC_FILES_REMEDY)
    raw = tables.open_files("items", source.items_path, connection)
    columns, fallback = source.item_columns, source.title_fallback
    if fallback is not None:
        if fallback not in raw.columns:
            raise DataError(
                f"source.items {source.items_path}",
                expected=f"column {fallback}",
                got=f"only {', '.join(raw.columns)}",
                remedy="correct source.title_fallback",
            )
        if (title := columns.get("title", "title")) in raw.columns:
            raw = raw.mutate(**{title: raw[title].nullif("").fill_null(raw[fallback])})
    if (brand := columns.get("brand", "brand")) in raw.columns:
        none = raw[brand].strip().lower() == _NO_BRAND
        raw = raw.mutate(**{brand: ibis.ifelse(none, ibis.null("string"), raw[brand])})
    table_source = TableSource(events=source.sequences_path, items=source.items_path, item_columns=columns)
    return tables.item_reading(table_source, raw)


def _open_lines(source: SequenceSource, connection: ibis.BaseBackend) -> ir.Table:
    """The file's lines with their number, from 1; blank ones left out."""
    filesystem, paths = find_files("sequences", source.sequences_path, PUBLIC_FILES_REMEDY)
    lines = open_found(connection, filesystem, paths, "raw_sequences", _LINES)
    numbered = lines.mutate(text=_.text.strip(), line=ibis.row_number().over(ibis.window()) + 1)
    kept = numbered.filter(_.text.length() > 0)
    return kept.filter(_.line <= source.max_users) if source.max_users else kept


def _events(lines: ir.Table) -> ir.Table:
    """A row per item with line, user, length of the line, place and `is_repeated`: an earlier line has the user.

    A line without items is one row without an item, to be refused.
    """
    words = lines.mutate(words=lines.text.re_split(r"\s+")).drop("text")
    users = words.mutate(user=words.words[0], items=words.words[1:], length=words.words.length() - 1).drop("words")
    marked = users.mutate(is_repeated=ibis.row_number().over(ibis.window(group_by="user", order_by="line")) > 0)
    marked = marked.mutate(user=ibis.ifelse(_.is_repeated, _.user + " (a second line)", _.user))
    rows = marked.unnest("items", offset="place", keep_empty=True).rename(item="items")
    return rows.mutate(place=rows.place.fill_null(0) + 1)
