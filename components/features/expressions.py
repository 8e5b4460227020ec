"""Ibis expressions that several modules share: instants, microseconds, a seeded order."""

from datetime import datetime

import ibis
import ibis.expr.types as ir


def instant(moment: datetime) -> ir.TimestampScalar:
    """A moment as a literal of the type that the canonical tables use."""
    return ibis.literal(moment, type="timestamp('UTC', 6)")


def microseconds(timestamp: ir.TimestampValue) -> ir.IntegerValue:
    """Microseconds since 1970 UTC."""
    return timestamp.delta(instant(datetime.fromisoformat("1970-01-01T00:00:00+00:00")), unit="microsecond")


def lowered(text: ir.StringValue) -> ir.StringValue:
    """Lower case that is the same on every engine, and that of `components.items.words.lowered`."""
    return text.lower().replace("ς", "σ").replace("i\u0307", "i")


def collect_in_order(order: ir.Value, value: ir.Value) -> ir.ArrayValue:
    """The values of a group as a list, by `order`, then by themselves; by neither is null.

    Lists of structs sort on every engine; an aggregate with an order is more than Spark has.
    """
    pairs = ibis.struct({"order": order, "value": value}).collect()
    return pairs.sort().map(lambda pair: pair["value"])


def seeded_key(seed: int, *values: ir.StringValue) -> ir.StringValue:
    """A text whose order is as good as random, the same for equal seed and values on every engine."""
    text = ibis.literal(str(seed))
    for value in values:
        text = text.concat("/", value)
    return text.hexdigest("md5")
