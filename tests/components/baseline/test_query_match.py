"""Match features of a query by plain loops, on all paths that the network reads them by."""

import numpy as np
import pytest
import torch

from components.baseline.bm25f import Bm25fIndex, Fields
from components.baseline.data import Dataset
from components.baseline.query_match import NUM_QUERY_MATCHES, NameMatch, QueryMatcher
from components.items.words import split_words
from tests.worlds.baseline import rows_with_query


def match_by_loops(data: Dataset, query: int) -> np.ndarray:
    """Features of all items, [n, F]."""
    if query < 0:
        return np.zeros((len(data.items), NUM_QUERY_MATCHES))
    text, fields = data.examples.queries[query], Fields(data.items)
    words = set(split_words(text))
    rows = []
    for path, brand, title in zip(data.items.categories, data.items.brands, data.items.titles, strict=True):
        named = [split_words(text) == split_words(name) for name in path]
        share = len(words & set(split_words(title))) / len(words)
        rows.append([any(named), named[-1], split_words(brand) == split_words(text), share])
    index = Bm25fIndex(fields, {"title": 1, "category": 1, "brand": 1})
    counts = fields.count([sorted(words)])
    shares = index.score(counts)[0] / (counts @ index.idf)[0]
    return np.column_stack([np.array(rows, dtype=float), shares])


def test_features_by_loops_on_all_paths(data: Dataset) -> None:
    rows = np.concatenate([rows_with_query(data, wanted=True), rows_with_query(data, wanted=False)])
    matches = QueryMatcher(data).of(data.examples.query[rows])
    expected = np.stack([match_by_loops(data, query) for query in data.examples.query[rows]])
    assert expected[0, :, 0].any() and expected[0, :, 3].any()
    assert matches.of_shared(torch.arange(len(data.items))).numpy() == pytest.approx(expected, abs=1e-5)
    own = torch.randint(len(data.items), (len(rows), 7), generator=torch.Generator().manual_seed(0))
    found = matches.of_own(own).numpy()
    assert found == pytest.approx(np.take_along_axis(expected, own.numpy()[..., None], axis=1), abs=1e-5)
    weights = torch.rand(len(rows), NUM_QUERY_MATCHES, generator=torch.Generator().manual_seed(0))
    found = matches.weighted(weights).numpy()
    assert found == pytest.approx(np.einsum("enf,ef->en", expected, weights.numpy()), abs=1e-5)


def test_a_name_is_equal_in_its_words() -> None:
    match = NameMatch([("Hair_Care & oils", "x"), ("hair care",), ()], ["hair care oils", "X", "care hair", "hair"])
    assert match.of(np.array([0, 1, 2, 3, -1])).toarray().tolist() == [[1, 0, 0], [1, 0, 0], [0] * 3, [0] * 3, [0] * 3]


def test_signs_name_nothing() -> None:
    match = NameMatch([("&",), ("***",), ("food",)], ["&", "food"])
    assert match.of(np.array([0, 1])).toarray().tolist() == [[0, 0, 0], [0, 0, 1]]
    assert NameMatch([("&",), ()], ["&"]).of(np.array([0, -1])).toarray().tolist() == [[0, 0], [0, 0]]
