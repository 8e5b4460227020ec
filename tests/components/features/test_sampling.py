from datetime import timedelta
from typing import Any

import ibis
import ibis.expr.types as ir
import pytest

from components.features.sampling import (
    build_examples,
    choose_examples,
    last_keys,
    number_contexts,
    possible_contexts,
)
from tests.worlds.logs import START, WEEK, make_config

NUM_USERS = 40
ANSWERS = {"user_id": "string", "cut_ts": "timestamp('UTC', 6)", "split": "string", "task_index": "int64"}
ANSWERS |= {"task": "string", "query": "string", "item_id": "int64", "category": "string"}


def make_answers() -> ir.Table:
    """Task `common` has an answer for every user and split, task `rare` for every fourth user."""
    rows: list[dict[str, Any]] = []
    for week, split in enumerate(("train", "validation", "test")):
        for user in range(NUM_USERS):
            base = {"user_id": f"u{user:02d}", "cut_ts": START + week * WEEK, "split": split, "query": None}
            common = base | {"task_index": 0, "task": "common"}
            rows += [common | {"item_id": item, "category": "bread"} for item in (7, 5)]
            rows.append(common | {"item_id": 6, "category": "milk"})
            if user % 4 == 0:
                rows.append(base | {"task_index": 1, "task": "rare", "item_id": 5, "category": None})
    return ibis.memtable(rows, schema=ANSWERS)


def chosen(seed: int = 0, **features: int) -> set[tuple[Any, ...]]:
    caps = {"max_train_contexts": 10, "max_validation_examples": 6, "max_test_examples": 8} | features
    table = choose_examples(make_answers(), make_config(**caps).features, seed).execute()
    rows = [(row.user_id, row.split, row.task_index) for row in table.itertuples()]
    assert len(rows) == len(set(rows))
    return set(rows)


def users_of(rows: set[tuple[Any, ...]], split: str, task_index: int) -> set[str]:
    return {user for user, of_split, task in rows if (of_split, task) == (split, task_index)}


def test_training_takes_whole_contexts(engine: ibis.BaseBackend) -> None:
    rows = chosen()
    common = users_of(rows, "train", 0)
    assert len(common) == 10
    assert users_of(rows, "train", 1) == {user for user in common if int(user[1:]) % 4 == 0}


@pytest.mark.parametrize(("split", "cap"), [("validation", 6), ("test", 8)])
def test_each_task_is_capped(engine: ibis.BaseBackend, split: str, cap: int) -> None:
    rows = chosen()
    assert len(users_of(rows, split, 0)) == cap
    assert len(users_of(rows, split, 1)) == cap


def test_tasks_share_contexts_as_far_as_a_common_order_allows(engine: ibis.BaseBackend) -> None:
    rows = chosen()
    common, rare = users_of(rows, "test", 0), users_of(rows, "test", 1)
    assert {user for user in common if int(user[1:]) % 4 == 0} <= rare


def test_caps_above_the_data_keep_everything(engine: ibis.BaseBackend) -> None:
    rows = chosen(max_train_contexts=1000, max_validation_examples=1000, max_test_examples=1000)
    assert len(rows) == 3 * (NUM_USERS + NUM_USERS // 4)


def test_the_choice_depends_on_the_seed_alone(engine: ibis.BaseBackend) -> None:
    assert chosen(0) == chosen(0)
    assert users_of(chosen(0), "test", 0) != users_of(chosen(1), "test", 0)


@pytest.mark.parametrize("seed", range(12))
def test_a_choice_by_shards_of_users_is_that_among_all(engine: ibis.BaseBackend, seed: int) -> None:
    caps = {"max_train_contexts": 10, "max_validation_examples": 3, "max_test_examples": 8}
    features, answers = make_config(**caps).features, make_answers()
    cuts = answers.select("cut_ts", "split").distinct()
    is_first = answers.user_id < f"u{NUM_USERS // 2}"
    first = engine.create_table("first", choose_examples(answers.filter(is_first), features, seed))
    keys = last_keys(first, features, num_tasks=2, seed=seed)
    assert set(keys) == {"train", "validation"}  # five of the first twenty users have a rare test example, not eight
    others = answers.filter(~is_first)
    possible = possible_contexts(others, cuts, keys, seed=seed)
    left = others.semi_join(possible, ["user_id", "cut_ts"])
    assert left.count().execute() < others.count().execute()
    choice = choose_examples(ibis.union(first, left.select(first.columns)), features, seed)
    columns = ["split", "cut_ts", "user_id", "task_index"]
    expected = choose_examples(answers, features, seed).order_by(columns).select(columns).to_pyarrow()
    assert choice.order_by(columns).select(columns).to_pyarrow().equals(expected)


def test_examples_refer_to_contexts_and_are_numbered_in_order(engine: ibis.BaseBackend) -> None:
    answers = make_answers()
    choice = choose_examples(answers, make_config().features, 0)
    contexts = number_contexts(choice)
    numbers = contexts.order_by("context_id").execute()
    assert numbers["context_id"].tolist() == list(range(3 * NUM_USERS))
    assert numbers["cut_ts"].is_monotonic_increasing
    assert set(numbers["cut_ts"].diff().dropna()) == {timedelta(0), WEEK}

    rows = build_examples(answers, choice, contexts).to_pyarrow().to_pylist()
    assert [row["example_id"] for row in rows] == list(range(len(rows)))
    assert [row["task"] for row in rows[:3]] == ["common", "rare", "common"]
    assert rows[0]["target_item_ids"] == [5, 6, 7]
    assert rows[0]["target_categories"] == ["bread", "milk"]
    assert rows[1]["target_categories"] == []
    by_id = numbers.set_index("context_id")
    assert all(by_id.loc[row["context_id"], "split"] == row["split"] for row in rows)
