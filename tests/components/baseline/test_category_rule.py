"""Items of the asked category come before all others; neighbours, then counts decide within both."""

import numpy as np
import pytest
import torch

from components.baseline.category_rule import CategoryMatch, CategoryRule
from components.baseline.data import Dataset, Ints, split_words
from components.baseline.rules import Popularity
from tests.worlds.baseline import rows_with_query


class Neighbours:
    """Scores of every third item, of a wide range."""

    def __init__(self, data: Dataset) -> None:
        self.scores = torch.full((len(data.items),), -torch.inf)
        self.scores[::3] = torch.logspace(-3, 3, len(self.scores[::3]))

    def score(self, rows: Ints) -> torch.Tensor:
        return self.scores.repeat(len(rows), 1)


@pytest.mark.parametrize("wanted", [True, False])
def test_category_then_neighbours_then_counts(data: Dataset, wanted: bool) -> None:
    neighbours, popularity = Neighbours(data), Popularity(data)
    rule = CategoryRule(data, neighbours, popularity, leaf_only=0.0)
    for row in rows_with_query(data, wanted=wanted):
        query = data.examples.queries[data.examples.query[row]] if wanted else None
        asked = [query in path for path in data.items.categories]
        counts = popularity.score(np.array([row]))[0].tolist()
        order = sorted(
            range(len(data.items)), key=lambda item: (asked[item], neighbours.scores[item], counts[item]), reverse=True
        )  # fmt: skip
        scores = rule.score(np.array([row]))[0].numpy()
        assert np.all(np.diff(scores[order]) <= 0)
        if wanted:
            assert scores[asked].min() > scores[~np.array(asked)].max()


def test_a_category_is_named_by_its_words_at_any_level_or_as_the_leaf(data: Dataset) -> None:
    name = data.items.categories[0][1]
    queries = (" ".join(split_words(name)).upper(), "no such thing")
    members = {
        leaf_only: CategoryMatch(data.items, queries, leaf_only=leaf_only).of(np.array([0, 1, -1])).toarray()
        for leaf_only in (False, True)
    }
    assert np.flatnonzero(members[False][0]).tolist() == [
        item for item, path in enumerate(data.items.categories) if name in path
    ]
    assert np.flatnonzero(members[True][0]).tolist() == [
        item for item, path in enumerate(data.items.categories) if path[-1] == name
    ]
    assert not members[False][1:].any()
