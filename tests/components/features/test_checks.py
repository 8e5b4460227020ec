from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ibis
import ibis.expr.types as ir
import pytest

from components.config import SplitConfig
from components.exceptions import ConfigError, DataError
from components.features.catalogue import build_catalogue
from components.features.checks import (
    count_examples,
    require_catalogue,
    require_covered_windows,
    require_tasks_in_log,
)
from tests.worlds.logs import START, Event, make_config, task

EVENTS = [
    Event("a", 1, START - timedelta(days=1), attributes={"in_display": "false"}),
    Event("a", 2, START, behavior="click", scenario="web"),
]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"behaviors": ["purchase", "buy"]}, "field target.behaviors.*one of purchase, click|click, purchase.*'buy'"),
        ({"scenarios": ["app"]}, "field target.scenarios: expected a value of the log.*got 'app'"),
        ({"attributes": {"in_display": "true"}}, "target.attributes.in_display.*one of false, got 'true'"),
        ({"attributes": {"weather": "fine"}}, "target.attributes.weather: expected an attribute of the events"),
    ],
)
def test_filters_on_what_no_event_has_are_refused(
    logged: Callable[..., ir.Table], target: dict[str, Any], message: str
) -> None:
    tasks = make_config([task(**target)]).tasks
    log = logged(EVENTS, sorted(tasks[0].target.attributes))
    with pytest.raises(ConfigError, match=message):
        require_tasks_in_log(log, tasks)


def test_filters_on_what_some_event_has_pass(logged: Callable[..., ir.Table]) -> None:
    wanted = task(behaviors=["click"], scenarios=["store", "web"], attributes={"in_display": "false"})
    require_tasks_in_log(logged(EVENTS, ["in_display"]), make_config([wanted]).tasks)


def test_an_empty_catalogue_is_refused(logged: Callable[..., ir.Table]) -> None:
    features = make_config(min_item_events=2).features
    with pytest.raises(DataError, match=r"items with 2 or more events before 2024-01-15: expected at least one item"):
        require_catalogue(build_catalogue(logged(EVENTS), features), features)


def test_a_log_that_does_not_half_cover_the_last_window_is_refused(logged: Callable[..., ir.Table]) -> None:
    split = make_config().features.split
    cut = split.cuts()[-1][0]
    enough = logged([Event("a", 1, cut + split.window / 2)])
    require_covered_windows(enough, split)
    short = logged([Event("a", 1, cut + split.window / 2 - timedelta(minutes=1))])
    with pytest.raises(
        DataError, match=r"the last window of features\.split, from 2024-01-22 .* move features.split.end"
    ):
        require_covered_windows(short, split)
    require_covered_windows(short, SplitConfig.model_validate({"kind": "leave_one_out"}))


def test_a_task_without_examples_in_a_split_is_refused(logged: Callable[..., ir.Table]) -> None:
    examples = ibis.memtable({"task": ["next_purchase"] * 2, "split": ["train", "validation"]})
    with pytest.raises(DataError, match=r"'next_purchase', split 'test'.*a log from 2024-01-07 to 2024-01-08"):
        count_examples(examples, logged(EVENTS), make_config())


def test_a_task_with_held_out_queries_needs_no_training_examples(logged: Callable[..., ir.Table]) -> None:
    config = make_config([task(query_category_level=0, held_out_query=True)])
    examples = ibis.memtable({"task": ["wanted"] * 2, "split": ["validation", "test"]})
    log = logged(EVENTS)
    counts = count_examples(examples, log, config)
    assert counts == {"wanted": {"train": 0, "validation": 1, "test": 1}}
    with pytest.raises(DataError, match="task 'wanted', split 'validation': expected at least one example"):
        count_examples(examples.filter(examples.split == "test"), log, config)
