"""BM25F against the formula by plain loops, and against a BM25 library where only the title has a weight."""

import dataclasses
import math

import bm25s
import numpy as np
import pytest
import torch

from components.baseline.bm25f import K1, TIE, B, Bm25f, Bm25fIndex, Fields
from components.baseline.data import Dataset
from components.items.words import split_words
from tests.worlds.baseline import history_of, rows_with_query

TITLES = ["red hair oil", "oil for dry hair and red skin", "soap", "hand soap soap"]
CATEGORIES = [("hair care", "oils"), ("hair care",), ("bath", "soap_bars"), ()]
BRANDS = ["", "dry & co", "soap co", ""]
WEIGHTS = {"title": 1.0, "category": 2.0, "brand": 0.5}


@pytest.fixture
def fields(data: Dataset) -> Fields:
    chosen = dict(ids=np.arange(4), titles=tuple(TITLES), categories=tuple(CATEGORIES), brands=tuple(BRANDS))
    return Fields(dataclasses.replace(data.items, **chosen))


def score_by_loops(item: int, query: list[str]) -> float:
    """The formula of the module's docstring."""
    texts = {"title": TITLES, "category": [" ".join(path) for path in CATEGORIES], "brand": BRANDS}
    words = {name: [split_words(text) for text in rows] for name, rows in texts.items()}
    score = 0.0
    for word in query:
        tf, found = 0.0, sum(any(word in words[name][other] for name in words) for other in range(4))
        for name, weight in WEIGHTS.items():
            lengths = [len(row) for row in words[name]]
            mean = np.mean([length for length in lengths if length])
            tf += weight * words[name][item].count(word) / (1 - B + B * lengths[item] / mean)
        score += math.log(1 + (4 - found + 0.5) / (found + 0.5)) * tf / (K1 + tf)
    return score


@pytest.mark.parametrize("query", ["hair oil", "soap", "dry red red skin", "bars unknown"])
def test_equals_the_formula_by_loops(fields: Fields, query: str) -> None:
    words = split_words(query)
    scores = Bm25fIndex(fields, WEIGHTS).score(fields.count([words]))[0]
    assert scores == pytest.approx([score_by_loops(item, words) for item in range(4)], rel=1e-5)


def test_is_bm25_where_only_the_title_has_a_weight(data: Dataset) -> None:
    fields = Fields(data.items)
    library = bm25s.BM25(k1=K1, b=B)
    library.index([split_words(title) for title in data.items.titles], show_progress=False)
    titles = [split_words(data.items.titles[item]) for item in (0, 7, 100)]
    scores = Bm25fIndex(fields, {"title": 1.0, "category": 0.0}).score(fields.count(titles))
    assert scores == pytest.approx(np.stack([library.get_scores(words) for words in titles]), rel=1e-4, abs=1e-5)


def test_share_reaches_one_for_endless_repeats_only(fields: Fields) -> None:
    index = Bm25fIndex(fields, {"title": 1e6})
    words = fields.count([["soap"], ["red", "oil"], ["unknown"]])
    assert index.share(words).toarray() == pytest.approx(np.array([[0, 0, 1, 1], [1, 1, 0, 0], [0] * 4]), abs=1e-4)


def test_a_query_is_looked_for_in_all_fields_and_the_popular_item_is_first_of_equals(data: Dataset) -> None:
    fields = Fields(data.items)
    model = Bm25f(data, fields, {"category": 1.0})
    rows = rows_with_query(data, wanted=True)
    for row, scores in zip(rows, model.score(rows), strict=True):
        words = split_words(data.examples.queries[data.examples.query[row]])
        expected = model.index.score(fields.count([words]))[0]
        assert torch.equal(torch.isfinite(scores), torch.from_numpy(expected > 0))
        ties = torch.from_numpy(TIE * data.items.popularity)[torch.isfinite(scores)]
        assert scores[torch.isfinite(scores)].numpy() == pytest.approx(expected[expected > 0] + ties.numpy(), abs=1e-5)


def test_without_a_query_words_of_the_newest_items_are_looked_for(data: Dataset) -> None:
    fields = Fields(data.items)
    row = rows_with_query(data, wanted=False)[:1]
    newest = data.contexts.items[history_of(data, row[0])][:2]
    texts = [f"{data.items.titles[item]} {data.items.brands[item]}" for item in newest]
    words = [word for text in texts for word in split_words(text)]
    model = Bm25f(data, fields, {"title": 1.0, "brand": 3.0}, history_items=2)
    expected = model.index.score(fields.count([words]))[0]
    scores = model.score(row)[0].numpy()
    assert scores[expected > 0] == pytest.approx(expected[expected > 0], abs=2e-4)
