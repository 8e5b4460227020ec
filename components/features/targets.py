"""Targets: which events of the window after a cut answer a task, and with which query."""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import RunConfig, TargetFilter, Task
from components.features.expressions import microseconds, seeded_key
from components.features.log import attribute_column
from components.features.queries import is_held_out, query_column
from components.features.window import new_category_column


def matches(events: ir.Table, target: TargetFilter, config: RunConfig) -> ir.BooleanValue:
    """Whether a window event meets the filter; a filter without fields lets every event pass.

    An unknown category is not new, an unknown brand is not known to the user, and no query asks for either.
    """
    conditions = [*_about_event(events, target), *_about_history(events, target), *_about_query(events, target, config)]
    return ibis.and_(ibis.literal(True), *conditions).fill_null(False)


def answers(events: ir.Table, task: Task, task_index: int, config: RunConfig) -> ir.Table:
    """The distinct items that answer a task, one row per user, cut and item, from `window.window_events`.

    Of several queries that the user's wanted items give at a cut, one is chosen by the seed.

    Returns:
        user_id, cut_ts, split, task_index, task, query (null without), item_id, category.
    """
    column = query_column(task.target)
    found = (
        events.filter(matches(events, task.target, config))
        .select(
            "user_id",
            "cut_ts",
            "split",
            "item_id",
            "category",
            task_index=ibis.literal(task_index, type="int64"),
            task=ibis.literal(task.name),
            query=ibis.null("string") if column is None else events[column],
        )
        .distinct()
    )
    if not task.trains:
        found = found.filter(_.split != "train")
    if column is None:
        return found
    key = seeded_key(config.seed, found.user_id, microseconds(found.cut_ts).cast("string"), found.query)
    of_context = ibis.window(group_by=["user_id", "cut_ts"])
    first = found.mutate(key=key).mutate(first=_.key.min().over(of_context))
    return first.filter(_.key == _.first).drop("key", "first")


def _about_event(events: ir.Table, target: TargetFilter) -> list[ir.BooleanValue]:
    conditions = [events[attribute_column(name)] == value for name, value in sorted(target.attributes.items())]
    if target.behaviors:
        conditions.append(events.behavior.isin(target.behaviors))
    if target.scenarios:
        conditions.append(events.scenario.isin(target.scenarios))
    if target.max_popularity_quantile is not None:
        conditions.append(events.popularity_quantile <= target.max_popularity_quantile)
    if target.max_train_events is not None:
        conditions.append(events.train_events <= target.max_train_events)
    return conditions


def _about_history(events: ir.Table, target: TargetFilter) -> list[ir.BooleanValue]:
    conditions = []
    if target.history != "any":
        conditions.append(events.is_new_item == (target.history == "not_bought"))
    if target.new_category_level is not None:
        conditions.append(events[new_category_column(target.new_category_level)])
    if target.known_brand:
        conditions.append(events.is_known_brand)
    if target.min_history_items is not None:
        conditions.append(events.num_history_items >= target.min_history_items)
    return conditions


def _about_query(events: ir.Table, target: TargetFilter, config: RunConfig) -> list[ir.BooleanValue]:
    column = query_column(target)
    if column is None:
        return []
    conditions = [events[column].notnull()]
    if target.held_out_query is not None:
        held_out = is_held_out(events[column], config.features.held_out_query_share, config.seed)
        conditions.append(held_out == target.held_out_query)
    return conditions
