from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import ibis
import ibis.expr.types as ir
import pytest

from components.features.catalogue import build_catalogue
from components.features.targets import answers
from components.features.window import window_events
from tests.worlds.logs import START, WEEK, Event, make_config, task, write_items

Find = Callable[..., list[dict[str, Any]]]
DAY = timedelta(days=1)
MICROSECOND = timedelta(microseconds=1)

# The user bought item 1 (bread) and item 2 (milk) before the cut, and all of the items below after it.
CATEGORIES = {1: ["FOOD", "BREAD"], 2: ["FOOD", "MILK"], 3: ["FOOD", "BREAD"], 4: ["HOME", "SOAP"], 5: ["HOME"], 6: []}
BRANDS = {1: "Miller", 2: "Dairy", 3: "Miller", 4: "Clean"}  # items 5 and 6 have none
BEFORE = [Event("a", 1, START - DAY), Event("a", 2, START - DAY)]
AFTER = [
    Event("a", 1, START),
    Event("a", 2, START + DAY, behavior="click"),
    Event("a", 3, START + DAY, scenario="web"),
    Event("a", 4, START + 2 * DAY, attributes={"in_display": "true", "top_right": "1"}),
    Event("a", 5, START + 2 * DAY, attributes={"in_display": "false"}),
    Event("a", 6, START + WEEK - MICROSECOND),
]
# Others make item 1 the most frequent one, then 2, 3, 4, 5, 6.
OTHERS = [Event("z", item, START - 2 * DAY) for item in CATEGORIES for _ in range(10 - item)]


@pytest.fixture
def find(engine: ibis.BaseBackend, logged: Callable[..., ir.Table], tmp_path: Path) -> Find:
    """Rows of `answers` for one task with this filter."""

    def run(target: dict[str, Any], events: list[Event] = BEFORE + AFTER + OTHERS) -> list[Any]:
        config = make_config([task(**target)])
        items = engine.read_parquet(str(write_items(tmp_path / "items.parquet", CATEGORIES, BRANDS)))
        log = logged(events, sorted(config.tasks[0].target.attributes))
        catalogue = build_catalogue(log, config.features)
        found = window_events(log, items, catalogue, config)
        return answers(found, config.tasks[0], 0, config).order_by("cut_ts", "item_id").to_pyarrow().to_pylist()

    return run


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ({}, [1, 2, 3, 4, 5, 6]),
        ({"behaviors": ["purchase"]}, [1, 3, 4, 5, 6]),
        ({"behaviors": ["purchase", "click"]}, [1, 2, 3, 4, 5, 6]),
        ({"scenarios": ["web"]}, [3]),
        ({"attributes": {"in_display": "true"}}, [4]),
        ({"attributes": {"top_right": "1"}, "known_brand": True}, []),
        ({"attributes": {"top_right": "1"}}, [4]),
        ({"history": "bought"}, [1, 2]),
        ({"history": "not_bought"}, [3, 4, 5, 6]),
        ({"new_category_level": 0}, [4, 5]),  # item 6 has no category: nobody knows whether it is new
        ({"new_category_level": 1}, [4]),
        ({"new_category_level": -1}, [4, 5]),  # leaves soap and home, after bread and milk
        ({"known_brand": True}, [1, 2, 3]),  # a brand that nobody knows is not the user's
        ({"max_train_events": 6}, [5, 6]),  # item n has 10 - n of user z and 1 of user a
        ({"min_history_items": 2}, [1, 2, 3, 4, 5, 6]),
        ({"max_popularity_quantile": 0.4}, [4, 5, 6]),
        ({"max_popularity_quantile": 0.39}, [5, 6]),
        ({"behaviors": ["purchase"], "history": "bought"}, [1]),
    ],
)
def test_each_filter_keeps_its_items(find: Find, target: dict[str, Any], wanted: list[int]) -> None:
    rows = find(target)
    assert [row["item_id"] for row in rows] == wanted
    found = {(row["user_id"], row["cut_ts"], row["split"], row["task"], row["query"]) for row in rows}
    assert found == ({("a", START, "train", "wanted", None)} if wanted else set())


def test_history_counts_from_the_whole_log_with_every_behaviour(find: Find) -> None:
    old = [Event("a", 3, START - 300 * DAY, behavior="click"), Event("a", 4, START - MICROSECOND)]
    assert [row["item_id"] for row in find({"history": "not_bought"}, BEFORE + AFTER + OTHERS + old)] == [5, 6]


@pytest.mark.parametrize(
    ("more", "number"),
    [
        ([], 0),
        ([Event("a", 1, START - 3 * DAY), Event("a", 2, START - 300 * DAY)], 0),
        ([Event("z", 3, START - DAY)], 0),
        ([Event("a", 3, START - MICROSECOND, behavior="click")], 6),
    ],
    ids=["two", "the same two again", "another user's", "a third"],
)
def test_the_size_of_a_history_is_its_distinct_items_before_the_cut(find: Find, more: list[Event], number: int) -> None:
    assert len(find({"min_history_items": 3}, BEFORE + AFTER + OTHERS + more)) == number


def test_the_cut_belongs_to_the_window_and_its_end_to_the_next(find: Find) -> None:
    events = [Event("a", 1, START - MICROSECOND), Event("a", 2, START), Event("a", 3, START + WEEK)]
    rows = find({}, [*events, Event("z", 3, START - DAY)])
    assert [(row["item_id"], row["split"]) for row in rows] == [(2, "train"), (3, "validation")]


def test_a_user_without_an_event_before_the_cut_has_no_targets(find: Find) -> None:
    assert find({}, [Event("a", 1, START), Event("a", 2, START + DAY)]) == []


def test_items_outside_the_catalogue_are_no_targets(find: Find) -> None:
    # Item 2 is first seen after the training window.
    assert find({}, [Event("a", 1, START - DAY), Event("a", 2, START + 2 * WEEK)]) == []


def test_an_item_bought_twice_is_one_target(find: Find) -> None:
    events = [Event("a", 1, START - DAY), Event("a", 1, START), Event("a", 1, START + DAY)]
    assert [row["item_id"] for row in find({}, events)] == [1]


def test_a_query_is_one_category_of_the_targets_in_words(find: Find) -> None:
    of_query = {"bread": [1, 3], "milk": [2], "soap": [4]}
    rows = find({"query_category_level": 1})
    (query,) = {row["query"] for row in rows}
    assert [row["item_id"] for row in rows] == of_query[query]


def test_queries_vary_with_the_user_and_not_with_the_run(
    engine: ibis.BaseBackend, logged: Callable[..., ir.Table], tmp_path: Path
) -> None:
    users = [f"user{number}" for number in range(60)]
    events = [Event(user, item, START + offset) for user in users for item, offset in ((1, -DAY), (1, DAY), (2, DAY))]
    config = make_config([task(query_category_level=1)])
    events += [Event("z", 2, START - DAY)]
    items = engine.read_parquet(str(write_items(tmp_path / "items.parquet", CATEGORIES)))
    log = logged(events)
    found = window_events(log, items, build_catalogue(log, config.features), config)

    def queries(seed: int) -> list[str]:
        seeded = config.model_copy(update={"seed": seed})
        return list(answers(found, config.tasks[0], 0, seeded).order_by("user_id").execute()["query"])

    first = queries(0)
    assert first == queries(0)
    assert first != queries(1)
    assert 15 < first.count("bread") < 45
