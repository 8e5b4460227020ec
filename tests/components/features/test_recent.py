from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pytest

from components.features.catalogue import build_catalogue
from components.features.recent import judged_by_the_past, past_frequencies
from components.features.targets import answers
from components.features.window import window_events
from tests.worlds.logs import START, WEEK, Event, make_config, task, write_items

Judge = Callable[..., list[Any]]
DAY = timedelta(days=1)
NUM_ITEMS = 5


@pytest.fixture
def judge(engine: ibis.BaseBackend, logged: Callable[..., ir.Table], tmp_path: Path) -> Judge:
    """Window events of the newest cuts, of a log in which item n < 5 was had n times before the first of them.

    In the two training windows users a and b have each item once, so that item n was had n + 2 times in all.
    """

    def run(target: dict[str, Any], recent_cuts: int = 2) -> list[dict[str, Any]]:
        starts = {"train_start": -1, "validation_start": 1, "test_start": 2, "end": 3}
        split = {name: START + week * WEEK for name, week in starts.items()} | {"recent_cuts": recent_cuts}
        config = make_config([task(**target)], split=split)
        had = [Event("z", item, START - 3 * WEEK) for item in range(NUM_ITEMS) for _ in range(item)]
        had += [Event(user, NUM_ITEMS - 1, START - 2 * WEEK) for user in "ab"]  # so that they have a history
        asked = [
            Event(user, item, start + DAY)
            for user, start in (("a", START - WEEK), ("b", START), ("a", START + WEEK))
            for item in range(NUM_ITEMS)
        ]
        table = write_items(tmp_path / "items.parquet", {item: ["FOOD"] for item in range(NUM_ITEMS)})
        items = engine.read_parquet(str(table))
        log = logged(had + asked, config=config)
        catalogue = build_catalogue(log, config.features)
        events = window_events(log, items, catalogue, config)
        past = past_frequencies(log, catalogue, config.features.split)
        judged = judged_by_the_past(events, past, config.features.split)
        assert set(judged.columns) == set(events.columns)
        found = answers(judged, config.tasks[0], 0, config)
        return found.order_by("cut_ts", "item_id").to_pyarrow().to_pylist()

    return run


@pytest.mark.parametrize(("recent_cuts", "cuts"), [(2, [START - WEEK, START]), (1, [START])])
def test_only_the_newest_training_cuts_are_judged(judge: Judge, recent_cuts: int, cuts: list[datetime]) -> None:
    rows = judge({}, recent_cuts)
    assert [(row["cut_ts"], row["split"]) for row in rows] == [(cut, "train") for cut in cuts for _ in range(NUM_ITEMS)]


@pytest.mark.parametrize(("limit", "items"), [(0, [0]), (2, [0, 1, 2]), (3, [0, 1, 2, 3])])
def test_events_count_from_before_the_first_newest_cut(judge: Judge, limit: int, items: list[int]) -> None:
    assert [row["item_id"] for row in judge({"max_train_events": limit})] == items * 2


def test_an_event_between_the_newest_cuts_does_not_count_for_the_later_one(judge: Judge) -> None:
    # With one newest cut, the week before it is past: every item had once more.
    assert [row["item_id"] for row in judge({"max_train_events": 2}, recent_cuts=1)] == [0, 1]


@pytest.mark.parametrize(("limit", "number"), [(0.01, 3), (0.25, 4), (0.74, 4), (1, 5)])
def test_a_quantile_is_that_of_as_many_events_in_the_whole_window(judge: Judge, limit: float, number: int) -> None:
    # In the whole window the items have 2, 3, 4, 5 and 8 events: three are as rare as one with two, at quantile 0.
    assert [row["item_id"] for row in judge({"max_popularity_quantile": limit})] == [*range(number)] * 2
