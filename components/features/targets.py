"""Targets: which events of the window after a cut answer a task, and with which query."""

from __future__ import annotations

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis import _

from components.config import SplitConfig, TargetFilter, Task
from components.features.categories import in_words, level_of, word_label
from components.features.engine import microseconds, seeded_key
from components.features.log import attribute_column


def window_events(
    log: ir.Table, items: ir.Table, catalogue: ir.Table, split: SplitConfig, tasks: Sequence[Task]
) -> ir.Table:
    """Events of catalogue items in the window after a cut, of users with an event before it.

    Returns:
        The log's columns with cut_ts, split, popularity_quantile, `category` (in words), `is_new_item` and
        `is_new_category_<level>` (against the user's whole log before the cut), and `query_<level>`.
    """
    cuts = ibis.memtable(_cuts_table(split))
    events = log.join(cuts, [log.ts >= cuts.cut_ts, log.ts < cuts.cut_end])
    paths = items.select("item_id", path=items.category)
    events = events.join(catalogue.drop("train_events"), "item_id").left_join(paths, "item_id").drop("item_id_right")
    events = _with_first(events, log.select("user_id", "ts"), [], "user_first_ts")
    events = events.filter(_.user_first_ts < _.cut_ts).drop("user_first_ts")
    events = _with_first(events, log.select("user_id", "item_id", "ts"), ["item_id"], "item_first_ts")
    events = events.mutate(category=word_label(_.path), is_new_item=_.item_first_ts >= _.cut_ts)
    for level in _levels(tasks, "new_category_level"):
        name = f"category_{level}"
        seen = log.join(paths, "item_id").select("user_id", "ts", **{name: level_of(_.path, level)})
        events = _with_first(events.mutate(**{name: level_of(_.path, level)}), seen, [name], "category_first_ts")
        events = events.mutate(**{f"is_new_{name}": _.category_first_ts >= _.cut_ts}).drop(name, "category_first_ts")
    for level in _levels(tasks, "query_category_level"):
        events = events.mutate(**{f"query_{level}": in_words(level_of(_.path, level))})
    return events.drop("path", "item_first_ts")


def matches(events: ir.Table, target: TargetFilter) -> ir.BooleanValue:
    """Whether a window event meets the filter; a filter without fields lets every event pass.

    An unknown category is not new, and no query asks for it.
    """
    conditions: list[ir.BooleanValue] = [ibis.literal(True)]
    if target.behaviors:
        conditions.append(events.behavior.isin(target.behaviors))
    if target.scenarios:
        conditions.append(events.scenario.isin(target.scenarios))
    conditions += [events[attribute_column(name)] == value for name, value in sorted(target.attributes.items())]
    if target.history != "any":
        conditions.append(events.is_new_item == (target.history == "not_bought"))
    if target.new_category_level is not None:
        conditions.append(events[f"is_new_category_{target.new_category_level}"])
    if target.max_popularity_quantile is not None:
        conditions.append(events.popularity_quantile <= target.max_popularity_quantile)
    if target.query_category_level is not None:
        conditions.append(events[f"query_{target.query_category_level}"].notnull())
    return ibis.and_(*conditions).fill_null(False)


def answers(events: ir.Table, task: Task, task_index: int, seed: int) -> ir.Table:
    """The distinct items that answer a task, one row a user, cut and item.

    Returns:
        user_id, cut_ts, split, task_index, task, query (null without), item_id, category.
    """
    level = task.target.query_category_level
    query = ibis.null("string") if level is None else events[f"query_{level}"]
    found = (
        events.filter(matches(events, task.target))
        .select(
            "user_id",
            "cut_ts",
            "split",
            "item_id",
            "category",
            task_index=ibis.literal(task_index, type="int64"),
            task=ibis.literal(task.name),
            query=query,
        )
        .distinct()
    )
    if level is None:
        return found
    key = seeded_key(seed, found.user_id, microseconds(found.cut_ts).cast("string"), found.query)
    of_context = ibis.window(group_by=["user_id", "cut_ts"])
    return found.mutate(key=key).filter(_.key == _.key.min().over(of_context)).drop("key")


def _with_first(events: ir.Table, seen: ir.Table, keys: list[str], name: str) -> ir.Table:
    """Add the instant of the user's first event with equal keys."""
    by = ["user_id", *keys]
    first = seen.group_by(by).agg(**{name: seen.ts.min()})
    joined = events.left_join(first, by)
    return joined.drop(*(column for column in joined.columns if column.endswith("_right")))


def _levels(tasks: Sequence[Task], field: str) -> list[int]:
    return sorted({level for task in tasks if (level := getattr(task.target, field)) is not None})


def _cuts_table(split: SplitConfig) -> pa.Table:
    timestamp = pa.timestamp("us", tz="UTC")
    schema = pa.schema([("cut_ts", timestamp), ("cut_end", timestamp), ("split", pa.string())])
    rows = [{"cut_ts": cut, "cut_end": cut + split.window, "split": name} for cut, name in split.cuts()]
    return pa.Table.from_pylist(rows, schema=schema)
