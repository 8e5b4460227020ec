"""The rules of the canonical tables, each stated once, as a Great Expectations expectation with a reason code.

Great Expectations is the only judge: a rule about rows names the rows it refuses, and those and no others go to the
quarantine. Nothing else in the code repeats a rule. What an expectation cannot say over one table alone (is the
item known, is this the first row of its key) stands as a helper column in the frame that it looks at, see
`components.validation.frames`.

The order of the rules matters: a row is quarantined once, under the first rule it breaks.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import great_expectations.expectations as gxe
from great_expectations.expectations.expectation import Expectation

from components.config import ValidationConfig
from components.schemas.events import EVENTS, ITEMS

OCCURRENCE = "occurrence"  # helper column: 1 for the first row of a key, then 2, 3, …
ITEM_IS_KNOWN = "item_is_known"  # helper column: whether the event's item is among the accepted items
EVENT_COLUMNS = ("event_id", "user_id", "item_id", "behavior", "scenario", "ts")
ITEM_COLUMNS = ("item_id", "external_id", "title", "price", "available")
SCHEMAS = {"events": EVENTS, "items": ITEMS}
KEYS = {"events": "event_id", "items": "item_id"}
REASON = "reason"  # key of a rule's code in the expectation's meta


@dataclass(frozen=True)
class Rule:
    """One rule."""

    reason: str  # code in the quarantine and in errors
    # of a rule about rows: what is wrong, with the row's fields in braces. Of a rule about the whole table: what is
    # expected of it
    message: str
    expectation: Expectation

    @property
    def counts_rows(self) -> bool:
        """Whether it is about the number of rows, which no batch of them tells."""
        return isinstance(self.expectation, gxe.ExpectTableRowCountToBeBetween)


def event_rules(config: ValidationConfig, now: datetime, previous_rows: int | None = None) -> list[Rule]:
    """Rules of the events table at an instant: what is later is of the future.

    `previous_rows` are the accepted events of the previous run of the same source, if there was one.
    """
    latest = now + timedelta(seconds=config.max_future_seconds)
    return [
        *_about_table("events", [*EVENT_COLUMNS, OCCURRENCE, ITEM_IS_KNOWN], config, previous_rows),
        *_about_keys("events", EVENT_COLUMNS),
        *(_not_blank(name) for name in ("event_id", "user_id", "behavior", "scenario")),
        _rule(
            "future_ts",
            f"ts {{ts}} is later than {latest:%Y-%m-%d %H:%M:%S} UTC, now and the clock skew allowed",
            gxe.ExpectColumnValuesToBeBetween,
            column="ts",
            max_value=latest,
        ),
        _rule(
            "unknown_item",
            "item_id {item_id} is not among the accepted items",
            gxe.ExpectColumnValuesToBeInSet,
            column=ITEM_IS_KNOWN,
            value_set=[True],
        ),
    ]


def item_rules(config: ValidationConfig, previous_rows: int | None = None) -> list[Rule]:
    """Rules of the items table; arguments as for `event_rules`."""
    return [
        *_about_table("items", [*ITEM_COLUMNS, OCCURRENCE], config, previous_rows),
        *_about_keys("items", ITEM_COLUMNS),
        _not_blank("title"),
        _rule(
            "price_out_of_range",
            f"price {{price}} is not between 0 and {config.max_price:g}",
            gxe.ExpectColumnValuesToBeBetween,
            column="price",
            min_value=0,
            max_value=config.max_price,
        ),
    ]


def _rule(reason: str, message: str, expectation: type[Expectation], **arguments: Any) -> Rule:
    return Rule(reason, message, expectation(meta={REASON: reason}, notes=f"reason code: {reason}", **arguments))


def _about_table(table: str, columns: list[str], config: ValidationConfig, previous_rows: int | None) -> list[Rule]:
    rules = [
        _rule(
            "columns",
            f"the columns {', '.join(columns)}",
            gxe.ExpectTableColumnsToMatchOrderedList,
            column_list=columns,
        ),
        _rule("id_type", "item_id as int64", gxe.ExpectColumnValuesToBeOfType, column="item_id", type_="int64"),
    ]
    if previous_rows is not None:
        least = int(previous_rows * config.min_volume_ratio)
        rules.append(
            _rule(
                "volume",
                f"at least {least} rows, {config.min_volume_ratio:g} of the previous run's {previous_rows}",
                gxe.ExpectTableRowCountToBeBetween,
                min_value=least,
            )
        )
    return rules


def _about_keys(table: str, columns: tuple[str, ...]) -> list[Rule]:
    key = KEYS[table]
    required = [name for name in columns if not SCHEMAS[table].field(name).nullable]
    return [
        *(
            _rule(f"missing_{name}", f"{name} is missing", gxe.ExpectColumnValuesToNotBeNull, column=name)
            for name in required
        ),
        _rule(
            f"duplicate_{key}",
            f"{key} {{{key}}} stands in an earlier row too",
            gxe.ExpectColumnValuesToBeBetween,
            column=OCCURRENCE,
            max_value=1,
        ),
    ]


def _not_blank(name: str) -> Rule:
    return _rule(f"blank_{name}", f"{name} is blank", gxe.ExpectColumnValuesToMatchRegex, column=name, regex=r"\S")
