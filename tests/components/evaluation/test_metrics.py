"""Metrics against hand-computed values, and against a brute-force oracle on random lists."""

import math

import numpy as np
import pytest

from components.evaluation.metrics import Ranked, count_hits, coverage, match_targets, ndcg, popularity_bias, recall


def build(lists: list[list[int]], targets: list[list[int]]) -> Ranked:
    def flat(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        offsets = np.cumsum([0] + [len(row) for row in rows])
        return np.array([item for row in rows for item in row], dtype=np.int64), offsets

    return match_targets(*flat(lists), *flat(targets))


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


def test_coverage_and_popularity_bias_by_hand(two: Ranked) -> None:
    assert coverage(two, 2, num_items=10) == pytest.approx(3 / 10)  # items 7, 3, 5
    quantiles = two.items / 10
    # top-1 items 7 and 5: mean .6; targets 3, 1, 8, 5: mean .425
    assert popularity_bias(quantiles, np.array([0.3, 0.1, 0.8, 0.5]), two, 1) == pytest.approx(0.175)
    assert math.isnan(popularity_bias(np.empty(0), np.array([0.3]), build([[]], [[1]]), 1))


def test_select_numbers_the_examples_anew(two: Ranked) -> None:
    second = two.select(np.array([False, True]))
    assert second.items.tolist() == [5, 7]
    assert second.owners.tolist() == [0, 0]
    assert count_hits(second, 1).tolist() == [1]


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
    shown = {item for items in lists for item in items[:k]}
    assert coverage(ranked, k, 60) == pytest.approx(len(shown) / 60)
