"""Items of the asked category come before all others; neighbours, then counts decide within both."""

import numpy as np
import pytest
import torch

from components.baseline.category_rule import CategoryRule
from components.baseline.data import Dataset, Ints
from components.baseline.rules import Popularity
from tests.worlds.baseline import rows_with_query


class Neighbours:
    """Scores of every third item, of a wide range."""

    def __init__(self, data: Dataset) -> None:
        self.scores = torch.full((len(data.items),), -torch.inf)
        self.scores[::3] = torch.logspace(-3, 3, len(self.scores[::3]))

    def score(self, rows: Ints) -> torch.Tensor:
        return self.scores.repeat(len(rows), 1)


@pytest.mark.parametrize("leaf_only", [False, True])
@pytest.mark.parametrize("wanted", [True, False])
def test_category_then_neighbours_then_counts(data: Dataset, wanted: bool, leaf_only: bool) -> None:
    neighbours, popularity = Neighbours(data), Popularity(data)
    rule = CategoryRule(data, neighbours, popularity, leaf_only)
    for row in rows_with_query(data, wanted=wanted):
        query = data.examples.queries[data.examples.query[row]] if wanted else None
        asked = [query in (path[-1:] if leaf_only else path) for path in data.items.categories]
        counts = popularity.score(np.array([row]))[0].tolist()
        order = sorted(
            range(len(data.items)), key=lambda item: (asked[item], neighbours.scores[item], counts[item]), reverse=True
        )  # fmt: skip
        scores = rule.score(np.array([row]))[0].numpy()
        assert np.all(np.diff(scores[order]) <= 0)
        assert any(asked) == (wanted and not leaf_only)  # this world asks for a level above the leaf
        if any(asked):
            assert scores[asked].min() > scores[~np.array(asked)].max()
