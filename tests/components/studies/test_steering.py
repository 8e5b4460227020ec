from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from components.exceptions import ConfigError
from components.flow import STUDIES
from components.storage import load_result, run_stage
from components.studies.phrases import Phrase
from components.studies.steering import _read_newest, compare, compare_fit, mean_gains, options, run, table

PHRASE = Phrase(phrase="For a pet.", categories=("pet",), seen_in_training=False)
CATEGORIES = {item: "shop > pet" if item < 5 else "shop > milk" for item in range(20)}


def lists(*rows):
    return [np.array(row, dtype=np.int64) for row in rows]


def test_compare_by_hand():
    users = [SimpleNamespace(item_ids=np.array([0, 10])), SimpleNamespace(item_ids=np.array([19]))]
    plain, guided = lists([0, 10, 11, 12], [5, 6, 7, 8]), lists([0, 1, 2, 10], [1, 5, 6, 7])
    row = compare(PHRASE, "next", users, plain, guided, CATEGORIES, seed=0)
    assert row["catalogue"] == 5 / 20
    assert row["without"] == pytest.approx((1 / 4 + 0) / 2)
    assert row["with"] == pytest.approx((3 / 4 + 1 / 4) / 2)
    assert row["gain"] == pytest.approx(3 / 8)
    assert (row["low"], row["high"]) == (pytest.approx(1 / 4), pytest.approx(1 / 2))
    assert row["history_without"] == pytest.approx((2 / 4 + 0) / 2)
    assert row["kept"] == pytest.approx((2 / 4 + 3 / 4) / 2)


def test_the_interval_covers_the_mean_and_narrows_with_users():
    random = np.random.default_rng(0)

    def measure(num_users):
        users = [SimpleNamespace(item_ids=np.array([0]))] * num_users
        plain = lists(*(random.choice(20, 10, replace=False) for _ in range(num_users)))
        guided = lists(*(random.choice(10, 10, replace=False) for _ in range(num_users)))
        return compare(PHRASE, "next", users, plain, guided, CATEGORIES, seed=0)

    few, many = measure(10), measure(200)
    for row in (few, many):
        assert row["low"] <= row["gain"] <= row["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]
    assert many["low"] < 0.25 < many["high"]  # by construction 5/10 against 5/20


def test_equal_lists_gain_nothing_for_sure():
    users = [SimpleNamespace(item_ids=np.array([0]))] * 3
    row = compare(PHRASE, "next", users, *[lists([0], [1], [9])] * 2, CATEGORIES, seed=0)
    assert (row["gain"], row["low"], row["high"], row["kept"]) == (0, 0, 0, 1)


def test_recall_of_next_items_by_hand():
    plain, guided = lists([1, 2], [3, 4], [5, 6]), lists([1, 3], [4, 7], [9, 5])
    targets = lists([1, 3], [7], [2])
    assert compare_fit(plain, guided, targets) == {
        "next_users": 3,
        "next_without": pytest.approx((1 / 2 + 0 + 0) / 3),
        "next_with": pytest.approx((1 + 1 + 0) / 3),
        "next_other": pytest.approx((0 + 0 + 0) / 3),  # of users 2, 3 and 1
    }
    assert compare_fit(plain, [guided[1], guided[0], guided[2]], targets)["next_other"] == pytest.approx(1 / 3)


def test_one_user_has_no_other_and_none_has_nothing():
    one = compare_fit(lists([1]), lists([1]), lists([1]))
    assert (one["next_without"], one["next_with"], one["next_other"]) == (1, 1, None)
    assert compare_fit([], [], []) == {"next_users": 0, "next_without": None, "next_with": None, "next_other": None}


def test_mean_gains_leave_out_an_empty_kind():
    rows = [{"gain": 0.25, "seen_in_training": True}, {"gain": 0.75, "seen_in_training": True}]
    assert mean_gains(rows) == {"seen": 0.5}


@pytest.fixture
def phrases(settings):
    path = settings.configs_dir / "guidance" / "complete_journey.yaml"
    path.write_text(
        "tasks: [next_purchase, new_item]\nphrases:\n"
        "  - {phrase: For a pet., categories: [pet food], seen_in_training: false}\n"
        "  - {phrase: Only milk., categories: ['> milk$'], seen_in_training: true, tasks: [new_item]}\n"
    )
    return path


def test_every_phrase_is_measured_for_its_tasks(phrases, settings, finished):
    run_dir, config = finished
    given = {"config": config, "settings": settings, "options": options(settings, config)}
    result = run_stage(STUDIES["steering"], run, run_dir=str(run_dir), **given, force=True)
    rows = result.metrics["phrases"]
    asked = [("For a pet.", "next_purchase"), ("For a pet.", "new_item"), ("Only milk.", "new_item")]
    assert [(row["phrase"], row["task"]) for row in rows] == asked
    assert all(row["catalogue"] == 0.25 for row in rows)
    assert all(row["history_with"] == 0 for row in rows if row["task"] == "new_item")  # it leaves out the history
    assert any(row["kept"] < 1 for row in rows)  # the words reach the model
    assert all(row["next_users"] > 0 and 0 <= row["next_with"] <= 1 for row in rows)
    assert result.counts["users"] == 8
    assert table(result.metrics).row_count == 3


def test_an_unknown_task_is_an_error_before_any_work(phrases, settings, finished):
    phrases.write_text(phrases.read_text().replace("next_purchase", "next_purchaze"))
    with pytest.raises(ConfigError, match=r"expected one of text_query, .*, got 'next_purchaze'"):
        options(settings, finished[1])


def test_a_configuration_without_phrases(settings, finished):
    config = finished[1].model_copy(update={"name": "marketplace"})
    with pytest.raises(ConfigError, match=r"guidance/marketplace\.yaml: expected a readable YAML file"):
        options(settings, config)


def test_nobody_counts_as_two_users(finished, tmp_path):
    """A user with several validation cuts is asked at the newest."""
    contexts = pq.read_table(load_result(str(finished[0]), "features").outputs["contexts"]).to_pandas()
    later = contexts[contexts["split"] == "validation"].iloc[:3]
    later = later.assign(context_id=later["context_id"] + 10_000, cut_ts=later["cut_ts"] + pd.Timedelta(days=7))
    pd.concat([later, contexts]).to_parquet(tmp_path / "contexts.parquet")
    found = _read_newest(SimpleNamespace(path=lambda *_: tmp_path / "contexts.parquet"))
    others = contexts[(contexts["split"] == "validation") & ~contexts["user_id"].isin(later["user_id"])]
    assert sorted(found) == sorted([*others["context_id"], *later["context_id"]])
