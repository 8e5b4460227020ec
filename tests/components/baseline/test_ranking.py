"""Ranking and recall against a brute-force oracle."""

import numpy as np
import pytest
import torch

from components.baseline.data import Dataset, Ints
from components.baseline.ranking import ByQuery, Ranking, choose, chunk_by_context, mean_recall, rank
from tests.worlds.baseline import history_of, targets_of


class Noise:
    """Fixed random scores; some items without any."""

    def __init__(self, data: Dataset, quality: float = 0.0) -> None:
        self.scores = torch.rand(len(data.examples.ids), len(data.items), generator=torch.Generator().manual_seed(1))
        self.scores[:, ::7] = -torch.inf
        for row in range(len(data.examples.ids)):
            self.scores[row, targets_of(data, row)] += quality

    def score(self, rows: Ints) -> torch.Tensor:
        return self.scores[torch.from_numpy(rows)].clone()


def test_equals_brute_force_and_drops_bought_items_where_the_task_says_so(data: Dataset) -> None:
    noise, rows = Noise(data), data.examples.rows("test")
    ranking = rank(noise, data, rows, depth=15)
    assert ranking.rows.tolist() == rows.tolist()
    for row, items in zip(ranking.rows, ranking.items, strict=True):
        excluded = data.tasks[data.examples.tasks[row]].exclude_bought
        had = set(data.contexts.items[history_of(data, row)].tolist()) if excluded else set()
        scores = {item: value for item, value in enumerate(noise.scores[row].tolist()) if item not in had}
        expected = sorted((item for item in scores if scores[item] > -np.inf), key=lambda item: -scores[item])[:15]
        assert items[items >= 0].tolist() == expected


def test_fewer_candidates_than_asked_end_in_minus_one(data: Dataset) -> None:
    ranking = rank(Noise(data), data, data.examples.rows("test")[:2], depth=10_000)
    assert ranking.items.shape[1] == len(data.items)
    assert (ranking.items[:, -1] == -1).all()


def test_mean_recall_by_hand(data: Dataset) -> None:
    rows = data.examples.rows("validation")
    items = np.full((len(rows), 3), -1)
    expected: dict[str, list[float]] = {task.name: [] for task in data.tasks}
    for position, row in enumerate(rows):
        targets = targets_of(data, row)
        items[position, 1] = targets[-1]  # one hit within the first three
        expected[data.tasks[data.examples.tasks[row]].name].append(1 / min(len(targets), 3))
    recall = mean_recall(Ranking(rows, items, np.zeros(items.shape, dtype=np.float32)), data, k=3)
    means = {task: np.mean(values) for task, values in expected.items()}
    assert {task: recall[task] for task in means} == pytest.approx(means)
    assert recall["mean"] == pytest.approx(np.mean(list(means.values())))


def test_chunks_keep_contexts_whole(data: Dataset) -> None:
    rows = data.examples.rows("train")
    chunks = list(chunk_by_context(data, rows, 7))
    assert np.concatenate(chunks).tolist() == rows.tolist()
    seen: set[int] = set()
    for chunk in chunks:
        contexts = set(data.examples.contexts[chunk].tolist())
        assert len(contexts) <= 7
        assert not contexts & seen
        seen |= contexts


def test_choose_takes_the_best_on_validation(data: Dataset) -> None:
    grid = [{"quality": value} for value in (0.0, 0.8, 0.2)]
    best, trials = choose(lambda quality: Noise(data, quality), grid, data, k=20)
    assert [trial["quality"] for trial in trials] == [0.8, 0.2, 0.0]
    assert best.score(np.array([0])).max() > 1.5


def test_choose_looks_at_the_examples_it_is_told_to(data: Dataset) -> None:
    validation = data.examples.rows("validation")
    rows = validation[data.examples.query[validation] >= 0]
    best, trials = choose(lambda quality: Noise(data, quality), [{"quality": 0.5}], data, k=20, rows=rows)
    assert trials[0]["validation_recall"] == mean_recall(rank(best, data, rows, 20), data, 20)["mean"]
    assert choose(lambda quality: Noise(data, quality), [{"quality": 0.5}], data, k=20, rows=rows[:0])[1] == []


def test_a_query_decides_who_scores(data: Dataset) -> None:
    asked, unasked = Noise(data), Noise(data, quality=5.0)
    rows = data.examples.rows("test")
    scores = ByQuery(data, asked, unasked).score(rows)
    has_query = data.examples.query[rows] >= 0
    assert torch.equal(scores[has_query], asked.score(rows[has_query]))
    assert torch.equal(scores[~has_query], unasked.score(rows[~has_query]))
    assert has_query.any() and not has_query.all()
