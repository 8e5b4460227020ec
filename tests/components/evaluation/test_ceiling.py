"""The ceiling: fusion by reciprocal ranks against hand-computed scores, and against an oracle on random lists."""

import itertools
from collections import defaultdict

import numpy as np
import pandas as pd
import pytest

from components.evaluation.ceiling import RANK_OFFSET, find_ceiling, fuse
from tests.worlds.tables import flat


def fused(*lists: list[list[int]], k: int) -> list[list[int]]:
    items, offsets = fuse([flat(rows) for rows in lists], k)
    return [items[start:end].tolist() for start, end in itertools.pairwise(offsets)]


def test_an_item_of_both_lists_comes_before_the_best_of_one() -> None:
    assert fused([[1, 2, 3], [9]], [[4, 3, 5], []], k=4) == [[3, 1, 4, 2], [9]]


def test_fusion_is_that_of_an_oracle() -> None:
    rng = np.random.default_rng(0)
    first, second = ([rng.permutation(12)[: rng.integers(13)].tolist() for _ in range(200)] for _ in range(2))
    expected = []
    for lists in zip(first, second, strict=True):
        scores: dict[int, float] = defaultdict(float)
        for ranked in lists:
            for rank, item in enumerate(ranked, start=1):
                scores[item] += 1 / (RANK_OFFSET + rank)
        expected.append(sorted(scores, key=lambda item: (-round(scores[item], 12), item))[:5])
    assert fused(first, second, k=5) == expected


def test_the_ceiling_is_the_best_of_all_and_says_whose() -> None:
    recalls = {"a": {"urm": 0.4, "target_attention": 0.5}, "b": {"urm": 0.2, "target_attention": 0.1}}
    rows = [(task, model, value) for task in recalls for model, value in recalls[task].items()]
    table = pd.DataFrame(rows, columns=["task", "model", "recall@7"])
    ceiling = find_ceiling(table, {"a": 0.45, "b": 0.3}, 7)
    best = {task: (entry["by"], entry["recall"]) for task, entry in ceiling["tasks"].items()}
    assert best == {"a": ("target_attention", 0.5), "b": ("ensemble", 0.3)}
    assert ceiling["mean"] == pytest.approx(0.4)
    assert ceiling["share"] == pytest.approx(0.3 / 0.4)
    assert ceiling["ensemble"] == pytest.approx(0.375)


def test_nothing_found_has_no_share() -> None:
    table = pd.DataFrame([{"task": "a", "model": "urm", "recall@7": 0.0}])
    assert find_ceiling(table, {"a": 0.0}, 7)["share"] is None
