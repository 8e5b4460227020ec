"""What an adapter hands to the stage: a raw table and, for each canonical column, how it is read.

Both sources, the packaged log and the user's own tables, become two `Reading`s; splitting one into the rows that can
be read and the rows that cannot, checking it and writing it are the same code for both.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass

import ibis
import ibis.expr.datatypes as dt
import ibis.expr.types as ir
import pyarrow as pa

from components.schemas.events import EVENTS, ITEMS

SCHEMAS: dict[str, pa.Schema] = {"events": EVENTS, "items": ITEMS}


@dataclass(frozen=True)
class Column:
    """One canonical column of a raw table."""

    name: str
    source: str  # where it comes from, for people: a column, a constant, or what it is made of
    raw: ir.Value  # value as the source has it
    typed: ir.Value  # the same in the canonical type; null where it cannot be read
    required: bool = False  # whether a row without it is refused

    @property
    def absent(self) -> ir.BooleanValue:
        """True where the source has no value."""
        return self.raw.isnull()

    @property
    def unreadable(self) -> ir.BooleanValue:
        """True where there is a value that the canonical type cannot hold."""
        return self.raw.notnull() & self.typed.isnull()


@dataclass(frozen=True)
class Reading:
    """A raw table with the columns read from it."""

    name: str  # "events" or "items"
    origin: str  # file, folder or glob it comes from, for messages
    raw: ir.Table  # the rows as they are
    columns: tuple[Column, ...]  # one for each field of the canonical schema
    log: "Log | None" = None  # for events of the user's own files

    @property
    def schema(self) -> pa.Schema:
        """Canonical Arrow schema of the table."""
        return SCHEMAS[self.name]

    @property
    def unfit(self) -> ir.BooleanValue:
        """True for the raw rows that lack a required value or hold an unreadable one."""
        problems = [column.absent for column in self.columns if column.required]
        return functools.reduce(operator.or_, [*problems, *(column.unreadable for column in self.columns)])

    def num_rows(self) -> int:
        """Number of the raw rows."""
        return int((self.log.rows if self.log else self.raw).count().execute())

    def readable(self) -> ir.Table:
        """Rows that fit the canonical schema, with its columns in its order."""
        typed = {column.name: column.typed for column in self.columns}
        rows = self.raw.filter(~self.unfit)
        return rows.select(**{field.name: typed[field.name].name(field.name) for field in self.schema})

    def rejected(self) -> ir.Table:
        """The raw rows that do not fit, with the reason code of their first problem as `_reason`."""
        reason = ibis.cases(
            *[(column.absent, f"missing_{column.name}") for column in self.columns if column.required],
            *[(column.unreadable, f"unreadable_{column.name}") for column in self.columns],
        )
        return self.raw.filter(self.unfit).mutate(_reason=reason)


@dataclass(frozen=True)
class Log:
    """Files of events before anything is made of their rows."""

    rows: ir.Table
    ts: ir.TimestampValue  # time of each row, null where it cannot be read
    read: Callable[[ir.Table], Reading]  # the reading of some of the rows; equal ids are made for rows of one instant


def canonical_type(schema: pa.Schema, name: str) -> dt.DataType:
    """Ibis type of a canonical column."""
    return dt.DataType.from_pyarrow(schema.field(name).type)
