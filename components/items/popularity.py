"""How often items were had, in several ways: the modality `popularity`, logarithms of counts of baskets.

    column 0     baskets that hold the item
    column 1     those of the newest windows, which tell what comes into fashion and what goes out of it; not under
                 leave-one-out, whose windows are places in a user's sequence (`SplitConfig.newest_windows`)
    the others   those in which an attribute of the event says "true" (on display, discounted, …): one column for each
                 attribute that says nothing but "true" and "false", by name

A basket is what a user had in one window of the split. At both instants (see id_vectors.py) what came before counts:
counts of the whole training window contain the very purchases that the newest training cuts ask for, and a model that
learns from them trusts popularity far too much. What "rarely sold" means in training follows (features/recent.py).
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt

from components.config import SplitConfig
from components.items.cooccurrence import Ints

Floats = npt.NDArray[np.float32]


class Popularity(NamedTuple):
    """log(1 + baskets) of n items, float32 [n, G], at the two instants."""

    past: Floats
    now: Floats


def count_popularity(events: Path, item_ids: Ints, split: SplitConfig) -> Popularity:
    """Count baskets before the newest training cuts, and before the end of the training window.

    Args:
        events: Folder of the validated events.
        item_ids: Items wanted, ascending [n].
        split: For the windows and the two instants.
    """
    table = ibis.duckdb.connect().read_parquet(f"{events}/**/*.parquet", hive_partitioning=True)
    attributes = _yes_no_attributes(table.filter(table.ts < split.validation_start))
    past = _count(table, item_ids, split, split.recent_start, attributes)
    now = _count(table, item_ids, split, split.validation_start, attributes)
    return Popularity(np.log1p(past), np.log1p(now))


def _yes_no_attributes(events: ir.Table) -> list[str]:
    said = events.select(name=events.attributes.keys().unnest(), value=events.attributes.values().unnest())
    by_name = said.group_by("name").agg(others=(~said.value.isin(["true", "false"])).sum())
    return sorted(by_name.filter(by_name.others == 0).name.to_pyarrow().to_pylist())


def _count(events: ir.Table, item_ids: Ints, split: SplitConfig, until: datetime, attributes: list[str]) -> Floats:
    """Baskets before an instant [n, G]."""
    seconds = events.ts.epoch_seconds() - int(split.train_start.timestamp())
    before = events.filter(events.ts < until).mutate(window=(seconds / split.window.total_seconds()).floor())
    counted = {"baskets": before.count() > 0}
    newest = split.newest_windows(until)
    if newest is not None:
        counted["recent"] = (before.ts >= newest).max()
    counted |= {f"said_{name}": (before.attributes.get(name, "false") == "true").max() for name in attributes}
    names = list(counted)
    baskets = before.group_by("item_id", "user_id", "window").agg(**counted)
    found = baskets.group_by("item_id").agg(**{name: baskets[name].sum() for name in names}).to_pyarrow()
    ids = found.column("item_id").to_numpy()
    rows = np.minimum(np.searchsorted(item_ids, ids), len(item_ids) - 1)
    wanted = item_ids[rows] == ids
    counts = np.zeros((len(item_ids), len(names)), dtype=np.float32)
    for column, name in enumerate(names):
        counts[rows[wanted], column] = found.column(name).to_numpy()[wanted]
    return counts
