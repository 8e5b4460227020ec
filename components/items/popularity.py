"""Interaction counts of the items, in several ways: the modality `popularity`, logarithms of counts of baskets.

    baskets      those that hold the item
    recent       those of the newest windows, which tell what comes into fashion and what goes out of it
    opened_<n>   those in which the user had something of the item's category at level n for the first time, of somewhat
                 more windows: what people begin a category with
    said_<name>  those in which an attribute of the event says "true" (on display, discounted, …): one column for each
                 attribute that says nothing but "true" and "false", by name

A basket is what a user had in one window of the split. Under leave-one-out, windows are places in a user's sequence and
no times (`SplitConfig.newest_windows`), so that there is neither `recent` nor `opened`.

At both instants (see id_vectors.py) what came before counts: counts of the whole training window contain the very
purchases that the newest training cuts ask for, and a model that learns from them trusts popularity far too much. What
"rarely sold" means in training follows (features/recent.py).
"""

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.config import SplitConfig
from components.engines.duckdb import memory_limit, read_folder

Floats = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]
CATEGORY_LEVELS = 3  # of the category path that `opened` looks at, from the top
_BYTES_PER_EVENT = 128  # of the engine's memory and disk while baskets are sorted: 12 GB for 88 million


class Popularity(NamedTuple):
    """log(1 + baskets) of n items, float32 [n, G], at the two instants."""

    past: Floats
    now: Floats


def count_popularity(engine: ibis.BaseBackend, events: Path, items: pa.Table, split: SplitConfig) -> Popularity:
    """Count baskets before the newest training cuts, and before the end of the training window.

    `items` are those wanted, by ascending `item_id`, with `category`, the path of each [n].
    """
    table = read_folder(engine, events)
    attributes = _yes_no_attributes(table.filter(table.ts < split.validation_start))
    levels = _with_levels(items)
    most = table.filter(table.ts < split.validation_start).count().execute() * _BYTES_PER_EVENT
    shares = 1 << int(most // memory_limit(engine)).bit_length()
    users = [table.filter(table.user_id.hash() & (shares - 1) == share) for share in range(shares)]
    past, now = (
        sum(_count(of_share, levels, split, until, attributes) for of_share in users)
        for until in (split.recent_start, split.validation_start)
    )
    return Popularity(np.log1p(past, dtype=np.float32), np.log1p(now, dtype=np.float32))


def _yes_no_attributes(events: ir.Table) -> list[str]:
    said = events.select(name=events.attributes.keys().unnest(), value=events.attributes.values().unnest())
    by_name = said.group_by("name").agg(others=(~said.value.isin(["true", "false"])).sum())
    return sorted(by_name.filter(by_name.others == 0).name.to_pyarrow().to_pylist())


def _count(events: ir.Table, items: pa.Table, split: SplitConfig, until: datetime, attributes: list[str]) -> Counts:
    """Baskets of these events before an instant [n, G]."""
    seconds = events.ts.epoch_seconds() - int(split.train_start.timestamp())
    before = events.filter(events.ts < until).mutate(window=(seconds / split.window.total_seconds()).floor())
    said = {f"said_{name}": (before.attributes.get(name, "false") == "true").max() for name in attributes}
    baskets = before.group_by("item_id", "user_id", "window").agg(last=before.ts.max(), **said)
    baskets = baskets.inner_join(ibis.memtable(items), "item_id")
    newest = _newest(baskets, split, until)
    baskets = baskets.mutate(had=1, **{name: flag.cast("int8") for name, flag in newest.items()})
    names = ["had", *newest, *said]
    found = baskets.group_by("item_id").agg(**{name: baskets[name].sum() for name in names}).to_pyarrow()
    rows = np.searchsorted(items.column("item_id").to_numpy(), found.column("item_id").to_numpy())
    counts = np.zeros((len(items), len(names)), dtype=np.int64)
    for column, name in enumerate(names):
        counts[rows, column] = found.column(name).to_numpy()
    return counts


def _newest(baskets: ir.Table, split: SplitConfig, until: datetime) -> dict[str, ir.BooleanColumn]:
    """Whether a basket is recent, and whether it opened a category at each level."""
    newest, opening = split.newest_windows(until), split.newest_windows(until, split.recent_cuts)
    if newest is None or opening is None:
        return {}
    flags = {"recent": baskets["last"] >= newest}
    began = baskets.window.min().over(group_by=baskets.user_id)
    for level in range(CATEGORY_LEVELS):
        category = baskets[f"level_{level}"]
        first = baskets.window.min().over(group_by=[baskets.user_id, category])
        opened = category.notnull() & (baskets.window == first) & (first > began)
        flags[f"opened_{level}"] = opened & (baskets["last"] >= opening)
    return flags


def _with_levels(items: pa.Table) -> pa.Table:
    """Item ids, and a number of the category down to each level; null where the path is shorter."""
    table = items.select(["item_id"])
    for level in range(CATEGORY_LEVELS):
        paths = ["\n".join(path[: level + 1]) if len(path) > level else None for path in items["category"].to_pylist()]
        table = table.append_column(f"level_{level}", pa.array(paths, pa.string()).dictionary_encode().indices)
    return table
