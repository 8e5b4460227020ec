"""Popularity and own history against counts by plain loops."""

from collections import Counter

import numpy as np
import pytest

from components.baseline.data import Dataset
from components.baseline.rules import OwnHistory, Popularity, history_weights
from tests.worlds.baseline import history_of, targets_of


def test_popularity_counts_training_targets_of_the_task(data: Dataset) -> None:
    examples, counter = data.examples, Counter()
    for row in range(len(examples.ids)):
        if examples.splits[row] == "train" and examples.tasks[row] == 1:
            counter.update(targets_of(data, row))
    popularity = Popularity(data)
    assert {item: int(count) for item, count in enumerate(popularity.counts[1]) if count} == dict(counter)
    best, scores = popularity.top(10)[1]
    assert counter[int(best[0])] == max(counter.values())
    assert np.all(np.diff(scores) <= 0)


def test_popularity_breaks_ties_by_all_training_events(data: Dataset) -> None:
    popularity = Popularity(data)
    never = np.flatnonzero(popularity.counts[1] == 0)
    order = never[np.argsort(-popularity.scores[1][never])]
    assert np.all(np.diff(data.items.train_events[order]) <= 0)


def test_own_history_scores_only_what_the_user_had(data: Dataset) -> None:
    row = data.examples.rows("test")[0]
    scores = OwnHistory(data, half_life_days=30).score(np.array([row]))[0].numpy()
    assert set(np.flatnonzero(np.isfinite(scores))) == set(data.contexts.items[history_of(data, row)])


def test_history_weight_by_hand() -> None:
    weights = history_weights(np.array([1, 3], dtype=np.float32), np.array([0, 30], dtype=np.float32), 30)
    assert weights.tolist() == [pytest.approx(np.log(2)), pytest.approx(np.log(4) / 2)]
