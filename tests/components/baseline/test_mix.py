"""The mix as plain sums over the history."""

import numpy as np
import pytest
import scipy.sparse as sp

from components.baseline.bm25f import Bm25f, Fields
from components.baseline.data import Dataset
from components.baseline.mix import HistoryMix, SearchMix
from components.baseline.text import TextFeatures
from tests.worlds.baseline import history_of, rows_with_query

SHARE, DECAY = 0.3, 0.6


@pytest.fixture
def history(data: Dataset, text: TextFeatures) -> HistoryMix:
    similarity = sp.random_array((len(data.items),) * 2, density=0.1, rng=np.random.default_rng(0), dtype=np.float32)
    return HistoryMix(data, text, sp.csr_array(similarity), text_share=SHARE, decay=DECAY)


def score_by_loops(history: HistoryMix, row: int) -> np.ndarray:
    items = history.data.contexts.items[history_of(history.data, row)]
    together, vectors = history.similarity.toarray(), history.text.items
    weights = [DECAY**rank for rank in range(len(items))]
    parts = [
        weight * (SHARE * vectors @ vectors[item] + (1 - SHARE) * together[item])
        for weight, item in zip(weights, items, strict=True)
    ]
    return np.sum(parts, axis=0) / sum(weights)


def test_history_by_loops(data: Dataset, history: HistoryMix) -> None:
    rows = rows_with_query(data, wanted=False)
    for row, scores in zip(rows, history.score(rows), strict=True):
        assert scores.numpy() == pytest.approx(score_by_loops(history, row), abs=2e-4)


def test_a_query_adds_its_text_its_words_and_its_category(
    data: Dataset, history: HistoryMix, text: TextFeatures
) -> None:
    words = Bm25f(data, Fields(data.items), {"title": 1.0, "category": 1.0})
    rows = rows_with_query(data, wanted=True)
    found = SearchMix(history, words, text, query_text=2.0, query_words=5.0, query_category=3.0).score(rows)
    for row, scores in zip(rows, found, strict=True):
        query = data.examples.query[row]
        greatest = float((words.queries[[query]] @ words.index.idf)[0])
        share = words.index.score(words.queries[[query]])[0] / greatest
        named = [data.examples.queries[query] in path for path in data.items.categories]
        assert any(named)
        expected = score_by_loops(history, row) + 2 * text.items @ text.queries[query] + 5 * share + 3 * np.array(named)
        assert scores.numpy() == pytest.approx(expected, abs=3e-3)
