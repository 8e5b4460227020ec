from collections.abc import Callable
from datetime import timedelta

import ibis.expr.types as ir
import pytest

from components.features.catalogue import build_catalogue
from tests.worlds.logs import START, WEEK, Event, make_config

BEFORE = START - timedelta(days=1)


def rows(log: ir.Table, min_item_events: int) -> list[tuple[int, int, float]]:
    table = build_catalogue(log, make_config(min_item_events=min_item_events).features)
    return [tuple(row) for row in table.execute().itertuples(index=False)]


def test_quantile_is_the_mean_rank_among_items(logged: Callable[..., ir.Table]) -> None:
    numbers = {10: 1, 20: 2, 30: 2, 40: 7, 50: 3}
    log = logged([Event("a", item, BEFORE) for item, number in numbers.items() for _ in range(number)])
    # Ranks from the rarest: item 10 has 0, items 20 and 30 share (1 + 2) / 2, item 50 has 3, item 40 has 4; over 4.
    assert rows(log, 1) == [(10, 1, 0.0), (20, 2, 0.375), (30, 2, 0.375), (40, 7, 1.0), (50, 3, 0.75)]


def test_only_events_before_the_first_validation_cut_count(logged: Callable[..., ir.Table]) -> None:
    validation_start = START + WEEK
    log = logged(
        [Event("a", 1, validation_start - timedelta(microseconds=1))] * 2
        + [Event("a", 2, validation_start)] * 5
        + [Event("a", 3, BEFORE), Event("a", 3, validation_start)]
    )
    assert rows(log, 2) == [(1, 2, 1.0)]


@pytest.mark.parametrize(("least", "kept"), [(0, [1, 2, 3]), (1, [1, 2]), (3, [2]), (4, [])])
def test_rare_items_are_left_out(logged: Callable[..., ir.Table], least: int, kept: list[int]) -> None:
    log = logged([Event("a", 1, BEFORE)] + [Event("a", 2, BEFORE)] * 3 + [Event("a", 3, START + 2 * WEEK)])
    assert [row[0] for row in rows(log, least)] == kept


def test_items_without_training_events_are_the_rarest(logged: Callable[..., ir.Table]) -> None:
    log = logged([Event("a", 1, BEFORE), Event("a", 2, START + WEEK), Event("a", 3, START + 2 * WEEK)])
    assert rows(log, 0) == [(1, 1, 1.0), (2, 0, 0.25), (3, 0, 0.25)]
