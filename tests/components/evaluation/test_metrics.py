"""Metrics against hand-computed values, and against a brute-force oracle on random lists."""

import math

import numpy as np
import pytest

from components.evaluation.metrics import NOT_FOUND, Ranked, count_hits, expose, find_ranks, ndcg, recall, surprise
from tests.worlds.tables import flat


def build(lists: list[list[int]], targets: list[list[int]]) -> Ranked:
    return find_ranks(*flat(lists), *flat(targets))


@pytest.fixture
def two() -> Ranked:
    return build([[7, 3, 9, 1], [5, 7]], [[3, 1, 8], [5]])


def test_hits_and_recall_by_hand(two: Ranked) -> None:
    assert count_hits(two, 2).tolist() == [1, 1]
    assert count_hits(two, 4).tolist() == [2, 1]
    assert recall(count_hits(two, 4), two.num_targets, 4).tolist() == [pytest.approx(2 / 3), 1.0]


def test_recall_of_a_list_full_of_targets_is_one_although_more_exist() -> None:
    ranked = build([[1, 2, 3]], [[1, 2, 3, 4, 5]])
    assert recall(count_hits(ranked, 2), ranked.num_targets, 2).tolist() == [1.0]


def test_ndcg_by_hand(two: Ranked) -> None:
    ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
    expected = (1 / math.log2(3) + 1 / math.log2(5)) / ideal
    assert ndcg(two, 4).tolist() == [pytest.approx(expected), 1.0]
    assert ndcg(two, 1).tolist() == [0.0, 1.0]


def test_an_empty_list_finds_nothing() -> None:
    ranked = build([[], [4]], [[1], [4]])
    assert count_hits(ranked, 5).tolist() == [0, 1]
    assert ndcg(ranked, 5).tolist() == [0.0, 1.0]


def test_ranks_stand_beside_their_targets(two: Ranked) -> None:
    assert two.ranks.tolist() == [1, 3, NOT_FOUND, 0]
    assert two.owners.tolist() == [0, 0, 0, 1]


def test_exposure_by_hand() -> None:
    exposure = expose(*flat([[7, 3, 9], [5], []]), 2, np.arange(10) / 10, np.arange(10.0))
    assert exposure.shown.tolist() == [2, 1, 0]
    assert exposure.quantile.tolist() == pytest.approx([1.0, 0.5, 0])
    assert exposure.surprise.tolist() == [10, 5, 0]


def test_surprise_is_in_bits() -> None:
    assert surprise(np.array([3, 0, 0, 1])).tolist() == pytest.approx([1, 3, 3, 2])


def test_some_targets_alone(two: Ranked) -> None:
    part = two.keep(np.array([False, True, True, False]))
    assert part.num_targets.tolist() == [2, 0]
    assert count_hits(part, 4).tolist() == [1, 0]


@pytest.mark.parametrize("k", [1, 3, 10, 40])
def test_equals_brute_force(k: int) -> None:
    random = np.random.default_rng(3)
    lists = [random.permutation(60)[: random.integers(0, 30)].tolist() for _ in range(50)]
    targets = [random.permutation(60)[: random.integers(1, 12)].tolist() for _ in range(50)]
    ranked = build(lists, targets)
    for row, (items, wanted) in enumerate(zip(lists, targets, strict=True)):
        hits = [rank for rank, item in enumerate(items[:k]) if item in set(wanted)]
        assert count_hits(ranked, k)[row] == len(hits)
        gain = sum(1 / math.log2(rank + 2) for rank in hits)
        ideal = sum(1 / math.log2(rank + 2) for rank in range(min(k, len(wanted))))
        assert ndcg(ranked, k)[row] == pytest.approx(gain / ideal)
