"""Behaviour sequences and user statistics: one row per user and period in which he was active.

A row holds everything of the user up to the end of the period. It is known one microsecond after the last event in
it, and stands until the user's next row. The state of an item (or a category) in a row follows from its last active
period up to then, so each state is joined to the rows from its own period to before its next one.
"""

from datetime import datetime

import ibis
import ibis.expr.types as ir
from ibis import _

from components.features.expressions import collect_in_order, instant, microseconds

MAX_CATEGORIES = 5
NEVER = 2**62  # a period after all others


def select_rows(events: ir.Table, first_cut: datetime) -> ir.Table:
    """The rows to write: of every user those known after the first cut, and the newest one before.

    Returns:
        user_id, period, known_at, num_events, num_items (distinct), num_active_days, last_us.
    """
    of_item = ibis.window(group_by=["user_id", "item_id"], order_by=["ts", "event_id"])
    periods = (
        events.mutate(is_first=ibis.row_number().over(of_item) == 0)
        .group_by("user_id", "period")
        .agg(last_ts=_.ts.max(), events=_.count(), new_items=_.is_first.sum())
    )
    so_far = ibis.cumulative_window(group_by="user_id", order_by="period")
    next_row = ibis.window(group_by="user_id", order_by="period")
    rows = periods.mutate(known_at=_.last_ts + ibis.interval(microseconds=1)).mutate(
        num_events=_.events.sum().over(so_far),
        num_items=_.new_items.sum().over(so_far),
        num_active_days=_.count().over(so_far),
        last_us=microseconds(_.last_ts),
        next_known_at=_.known_at.lead().over(next_row),
    )
    return rows.filter(_.next_known_at.isnull() | (_.next_known_at > instant(first_cut))).drop(
        "last_ts", "events", "new_items", "next_known_at"
    )


def behavior_sequence(rows: ir.Table, events: ir.Table, history_length: int) -> ir.Table:
    """Source of the Feast view of that name: the user's distinct items so far, newest first.

    Items of one instant stand in the order of their counts, then of their ids.
    """
    states = _states(events, "item_id")
    # The order of a row's items is the order of their states, the same in all rows: sort the few states once.
    newest_first = ibis.window(group_by="user_id", order_by=[_.last_ts.desc(), _.total.desc(), _.item_id])
    states = states.mutate(position=ibis.row_number().over(newest_first))
    fields = {
        "position": states.position,  # first: lists of structs sort by it
        "history_item_ids": states.item_id,
        "history_counts": states.total.cast("int32"),
        "history_last_us": microseconds(states.last_ts),
        "history_behaviors": states.last_behavior,
    }
    states = states.select("user_id", "since", "until", item=ibis.struct(fields))
    histories = _join_states(rows, states).group_by("user_id", "known_at").agg(items=_.item.collect())
    histories = histories.mutate(items=_.items.sort()[:history_length])
    return histories.select(
        "user_id",
        "known_at",
        **{name: _field_of_each(histories["items"], name) for name in fields if name != "position"},
    ).order_by("user_id", "known_at")


def user_statistics(rows: ir.Table, events: ir.Table) -> ir.Table:
    """Source of the Feast view of that name; `events` must have `category` in words, null where there is none."""
    pairs = _join_states(rows, _states(events.filter(events.category.notnull()), "category"))
    order = [_.total.desc(), _.category]
    rank = ibis.row_number().over(ibis.window(group_by=["user_id", "period"], order_by=order))
    top = (
        pairs.mutate(rank=rank)
        .filter(_.rank < MAX_CATEGORIES)
        .group_by("user_id", "known_at")
        .agg(top_categories=collect_in_order(_.rank, _.category))
    )
    joined = rows.left_join(top, ["user_id", "known_at"])
    return joined.select(
        "user_id",
        "known_at",
        "num_events",
        "num_items",
        "num_active_days",
        "last_us",
        top_categories=joined.top_categories.fill_null(ibis.literal([], type="array<string>")),
    ).order_by("user_id", "known_at")


def _states(events: ir.Table, key: str) -> ir.Table:
    """State of each (user, key) from an active period on, up to before its next one in `until`."""
    active = events.group_by("user_id", key, "period").agg(
        events=_.count(),
        last_ts=_.ts.max(),
        last_behavior=_.behavior.argmax(ibis.struct({"ts": _.ts, "event_id": _.event_id})),
    )
    return active.mutate(
        total=_.events.sum().over(ibis.cumulative_window(group_by=["user_id", key], order_by="period")),
        until=_.period.lead().over(ibis.window(group_by=["user_id", key], order_by="period")).fill_null(NEVER),
    ).rename(since="period")


def _join_states(rows: ir.Table, states: ir.Table) -> ir.Table:
    """Every row with the state of each key that the user had by then."""
    rows = rows.select("user_id", "period", "known_at")
    return rows.join(states, ["user_id", states.since <= rows.period, rows.period < states.until])


def _field_of_each(structs: ir.ArrayValue, name: str) -> ir.ArrayValue:
    return structs.map(lambda struct: struct[name])
