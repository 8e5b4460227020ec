"""The events of the window after each cut, with all that the tasks' filters ask about them.

Whether something is new or known to the user is asked of his whole log before the cut, strictly.
"""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir
import pyarrow as pa
from ibis import _

from components.config import RunConfig, SplitConfig, Task
from components.features.categories import level_of, word_label
from components.features.queries import with_queries


def window_events(
    log: ir.Table, items: ir.Table, catalogue: ir.Table, config: RunConfig, contexts: ir.Table | None = None
) -> ir.Table:
    """Events of catalogue items in the window after a cut, of users with an event before it.

    Where `contexts` are given (user_id, cut_ts), of these only.

    Returns:
        The log's columns with cut_ts, split, train_events, popularity_quantile, `category` (in words), `is_new_item`;
        where a task asks for it `is_new_category_<level>`, `is_known_brand`, `num_history_items`, and the queries of
        `queries.with_queries`.
    """
    tasks = config.tasks
    if contexts is not None:
        log = log.semi_join(contexts, "user_id")
    cuts = all_cuts(config.features.split)
    events = log.join(cuts, [log.ts >= cuts.cut_ts, log.ts < cuts.cut_end])
    if contexts is not None:
        events = events.semi_join(contexts, ["user_id", "cut_ts"])
    about = items.select("item_id", "title", "brand", path=items.category)
    events = events.join(catalogue, "item_id").left_join(about, "item_id").drop("item_id_right")
    events = _with_first(events, log.select("user_id", "ts"), [], "user_first_ts")
    events = events.filter(_.user_first_ts < _.cut_ts).drop("user_first_ts")
    events = _with_first(events, log.select("user_id", "item_id", "ts"), ["item_id"], "item_first_ts")
    events = events.mutate(category=word_label(_.path), is_new_item=_.item_first_ts >= _.cut_ts)
    for level in _new_category_levels(tasks):
        events = _with_new_category(events, log, about, level)
    if any(task.target.known_brand for task in tasks):
        seen = log.join(about.select("item_id", "brand"), "item_id").select("user_id", "brand", "ts")
        events = _with_first(events, seen, ["brand"], "brand_first_ts")
        events = events.mutate(is_known_brand=_.brand_first_ts < _.cut_ts).drop("brand_first_ts")
    if any(task.target.min_history_items is not None for task in tasks):
        events = _with_history_size(events, log)
    return with_queries(events, config).drop("path", "title", "brand", "item_first_ts")


def all_cuts(split: SplitConfig) -> ir.Table:
    """Every cut_ts with its cut_end and split."""
    timestamp = pa.timestamp("us", tz="UTC")
    schema = pa.schema([("cut_ts", timestamp), ("cut_end", timestamp), ("split", pa.string())])
    rows = [{"cut_ts": cut, "cut_end": cut + split.window, "split": name} for cut, name in split.cuts()]
    return ibis.memtable(pa.Table.from_pylist(rows, schema=schema))


def new_category_column(level: int) -> str:
    """Column that says whether the category at this level is new to the user; null where there is no category."""
    return f"is_new_category_{level}"


def _with_new_category(events: ir.Table, log: ir.Table, about: ir.Table, level: int) -> ir.Table:
    seen = log.join(about, "item_id").select("user_id", "ts", level=level_of(_.path, level))
    events = _with_first(events.mutate(level=level_of(_.path, level)), seen, ["level"], "level_first_ts")
    return events.mutate(**{new_category_column(level): _.level_first_ts >= _.cut_ts}).drop("level", "level_first_ts")


def _with_history_size(events: ir.Table, log: ir.Table) -> ir.Table:
    """Add `num_history_items`: the user's distinct items before the cut."""
    contexts = events.select("user_id", "cut_ts").distinct()
    firsts = log.group_by("user_id", "item_id").agg(first_ts=log.ts.min())
    had = contexts.join(firsts, ["user_id", firsts.first_ts < contexts.cut_ts])
    sizes = had.group_by("user_id", "cut_ts").agg(num_history_items=_.count())
    return events.join(sizes, ["user_id", "cut_ts"])


def _with_first(events: ir.Table, seen: ir.Table, keys: list[str], name: str) -> ir.Table:
    """Add the instant of the user's first event with equal keys."""
    by = ["user_id", *keys]
    first = seen.group_by(by).agg(**{name: seen.ts.min()})
    return events.left_join(first, by).drop(*(f"{key}_right" for key in by))


def _new_category_levels(tasks: Sequence[Task]) -> list[int]:
    return sorted({task.target.new_category_level for task in tasks if task.target.new_category_level is not None})
