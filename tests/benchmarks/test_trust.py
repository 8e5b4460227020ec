from datetime import date, timedelta

import numpy as np
import pandas as pd
import pytest

from benchmarks.trust import MODELS, Week, fit_trust, make_week, measure, rank_items, recall_by_user
from components.studies.abilities.calendar import Calendar, Occasion

DAY = date(2017, 7, 4)
CALENDAR = Calendar(
    zone="UTC",
    level=1,
    window_days=2,
    ordinary="a day",
    occasions=(Occasion(name="the fair", day=DAY), Occasion(name="the ball", day=date(2017, 9, 4))),
    templates=("For {occasion}, people buy {category}",),
)


def log(*rows):
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "before"])
    return table.assign(day=[DAY - timedelta(days=before) for before in table["before"]])


def make(scores, rows):
    frame = pd.DataFrame({"category": ["milk", "ice"], "lift": np.exp(scores)} | {name: scores for name in MODELS[:3]})
    categories = pd.Series(["milk", "milk", "ice", "other"], index=[1, 2, 3, 4])
    return make_week("the fair", frame, log(*rows), categories, CALENDAR)


HISTORY = [("a", 1, 9), ("b", 1, 9), ("b", 1, 8), ("c", 2, 9), ("c", 3, 9), ("a", 4, 29), ("a", 4, 2)]
WEEK = [("a", 3, 1), ("a", 3, 0), ("a", 1, 0), ("c", 3, 0), ("d", 4, 0)]


def test_a_week_by_hand():
    week = make([-1.0, 1.0], HISTORY + WEEK)
    assert week.popularity.to_dict() == {1: 2, 2: 1, 3: 1, 4: 1}  # users, not purchases, of days 29 to 2 before
    assert sorted(week.bought["all"].itertuples(index=False, name=None)) == [("a", 1), ("a", 3), ("c", 3), ("d", 4)]
    assert sorted(week.bought["new"].itertuples(index=False, name=None)) == [("a", 3), ("d", 4)]
    assert week.scores["pretrained"].to_dict() == {1: -1, 2: -1, 3: 1, 4: 0}
    np.testing.assert_allclose(week.scores["lift"], week.scores["pretrained"])
    assert rank_items(week, "pretrained", 0.0, k=2).tolist() == [1, 2]
    assert rank_items(week, "pretrained", 1.0, k=2).tolist() == [3, 4]  # e, 1; the milk has 2 / e and 1 / e
    assert recall_by_user(week.bought["all"], np.array([1, 2])).to_dict() == {"a": 0.5, "c": 0, "d": 0}


def week_of(bought, score):
    """300 items as popular as each other; scores stand for the last hundred."""
    items = np.arange(300)
    pairs = pd.DataFrame({"user_id": np.repeat(np.arange(50), 4), "item_id": np.resize(bought, 200)})
    scores = pd.DataFrame({name: np.where(items >= 200, score, 0.0) for name in MODELS}, index=items)
    return Week("w", pd.Series(5.0, index=items), {"all": pairs, "new": pairs}, scores)


def test_the_trust_is_what_would_have_helped_before():
    right, wrong = week_of(np.arange(200, 300), 1.0), week_of(np.arange(100), 1.0)
    assert fit_trust([right], "pretrained", "all") > 0 == fit_trust([wrong], "pretrained", "all")
    helped = measure([right, right, right], "all", seed=0)["pretrained"]
    assert (helped["popularity"], helped["gain"], len(helped["weeks"])) == (0, 1, 2)
    misled = measure([right, wrong], "new", seed=0)["pretrained"]
    assert (misled["gain"], misled["low"], misled["high"]) == pytest.approx((-1, -1, -1))
    assert measure([wrong, right], "all", seed=0)["pretrained"]["gain"] == pytest.approx(0)
