"""Which items can be recalled: those seen often enough in the training window."""

import ibis
import ibis.expr.types as ir
from ibis import _

from components.config import FeaturesConfig
from components.features.expressions import instant


def build_catalogue(log: ir.Table, features: FeaturesConfig) -> ir.Table:
    """The CATALOGUE table, sorted by item_id; where no training event is asked for, every item of the log is in it.

    `popularity_quantile` is (rank - 1) / (items - 1) by training events, with the mean rank for ties; a lone item
    has 1.
    """
    in_training = log.ts < instant(features.split.validation_start)
    counts = (
        log.group_by("item_id")
        .agg(train_events=in_training.cast("int64").sum())
        .filter(_.train_events >= features.min_item_events)
    )
    fewer = ibis.rank().over(ibis.window(order_by=counts.train_events))  # items with fewer events
    ties = counts.count().over(ibis.window(group_by=counts.train_events))
    others = counts.count().over(ibis.window()) - 1
    quantile = (others > 0).ifelse((fewer + (ties - 1) / 2) / others.nullif(0), 1.0)
    return counts.mutate(popularity_quantile=quantile.cast("float32")).order_by("item_id")
