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


def judged_by_the_past(events: ir.Table, past: ir.Table, split: SplitConfig) -> ir.Table:
    """Events of `window.window_events` in the newest training cuts, with the frequencies of `past_frequencies`."""
    start = instant(split.recent_start)
    recent = events.filter((events.split == "train") & (events.cut_ts >= start))
    return recent.drop("train_events", "popularity_quantile").join(past, "item_id")


def past_frequencies(log: ir.Table, catalogue: ir.Table, split: SplitConfig) -> ir.Table:
    """The frequencies that the items of the catalogue had before the newest training cuts.

    Returns:
        item_id, `train_events`: events before the first of these cuts, and `popularity_quantile`: that of an item with
        so many events in the whole training window, so that one limit means one number of events.
    """
    before = log.filter(log.ts < instant(split.recent_start)).group_by("item_id").agg(before=_.count())
    counted = catalogue.select("item_id").left_join(before, "item_id").drop("item_id_right")
    counted = counted.mutate(train_events=_.before.fill_null(0)).drop("before")
    return counted.join(_quantiles(counted, catalogue), "train_events")


def _quantiles(counted: ir.Table, catalogue: ir.Table) -> ir.Table:
    """`popularity_quantile` by number of events, for the numbers that occur."""
    levels = counted.select("train_events").distinct()
    sizes = catalogue.group_by("train_events").agg(items=_.count())
    at_most = levels.left_join(sizes, levels.train_events >= sizes.train_events)
    ranks = at_most.group_by("train_events").agg(
        fewer=_["items"].sum(where=_.train_events_right < _.train_events).fill_null(0),
        ties=_["items"].sum(where=_.train_events_right == _.train_events).fill_null(0),
    )
    others = catalogue.count().as_scalar() - 1
    quantile = (ranks.fewer + ibis.greatest(ranks.ties - 1, 0) / 2) / others.nullif(0)
    return ranks.select("train_events", popularity_quantile=quantile.fill_null(1.0).cast("float32"))
