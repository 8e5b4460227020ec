"""The newest training cuts as URM trains on them: what is rare there is judged by what came before them.

Elsewhere an item's frequency is that of the whole training window, so that for training cuts it counts the very events
that are asked for. Of the items with two events in that window, those that a newest cut asks for had one or none
before it; a model that tells rare items by what came before, as URM does in serving, would learn from the wrong ones.
"""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import SplitConfig
from components.features.expressions import instant


def judged_by_the_past(events: ir.Table, log: ir.Table, catalogue: ir.Table, split: SplitConfig) -> ir.Table:
    """Events of `window.window_events` in the newest training cuts, with the frequencies their items had before these.

    Returns:
        The rows of these cuts; `train_events` counts events before the first of them, and `popularity_quantile` is that
        of an item with so many events in the whole training window, so that one limit means one number of events.
    """
    start = instant(split.recent_start)
    before = log.filter(log.ts < start).group_by("item_id").agg(before=_.count())
    recent = events.filter((events.split == "train") & (events.cut_ts >= start)).drop(
        "train_events", "popularity_quantile"
    )
    counted = recent.left_join(before, "item_id").drop("item_id_right").mutate(train_events=_.before.fill_null(0))
    return counted.join(_quantiles(before, catalogue), "train_events").drop("before")


def _quantiles(before: ir.Table, catalogue: ir.Table) -> ir.Table:
    """`popularity_quantile` by number of events, for zero and the numbers that occur."""
    levels = ibis.union(before.select(train_events=before.before), ibis.memtable({"train_events": [0]}), distinct=True)
    sizes = catalogue.group_by("train_events").agg(items=_.count())
    at_most = levels.left_join(sizes, levels.train_events >= sizes.train_events)
    ranks = at_most.group_by("train_events").agg(
        fewer=_["items"].sum(where=_.train_events_right < _.train_events).fill_null(0),
        ties=_["items"].sum(where=_.train_events_right == _.train_events).fill_null(0),
    )
    others = catalogue.count().as_scalar() - 1
    quantile = (ranks.fewer + ibis.greatest(ranks.ties - 1, 0) / 2) / others.nullif(0)
    return ranks.select("train_events", popularity_quantile=quantile.fill_null(1.0).cast("float32"))
