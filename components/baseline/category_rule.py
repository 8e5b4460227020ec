"""The rule of a shop's category page: items of the asked category first, then all others; neighbours, then counts.

Within both parts items are ordered by item-kNN, and where it knows nothing by how often they are targets of the task.
A category counts at any level of the path, or as the leaf alone. A query that names none, or no query at all, leaves
neighbours and counts.
"""

import torch

from components.baseline.data import Dataset, Ints
from components.baseline.query_match import NameMatch
from components.baseline.ranking import Scorer
from components.baseline.rules import Popularity

TIE = 1e-6  # of equal neighbours the more frequent target is first


class CategoryRule:
    """Category, then neighbours, then counts."""

    def __init__(self, data: Dataset, neighbours: Scorer, popularity: Popularity, leaf_only: float) -> None:
        self.data = data
        self.neighbours = neighbours
        self.popularity = popularity
        paths = data.items.categories
        self.match = NameMatch([path[-1:] for path in paths] if leaf_only else paths, data.examples.queries)

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue], in double precision: 4 for the category, 2 to 3 for a neighbour."""
        near = self.neighbours.score(rows).double()
        known = near > -torch.inf
        near = torch.where(known, near, 0.0)
        counts = self.popularity.score(rows).double()
        often = counts / (1 + counts)
        scores = torch.where(known, 2 + near / (1 + near) + TIE * often, often)
        wanted = self.match.of(self.data.examples.query[rows])
        return scores + 4 * torch.from_numpy(wanted.toarray())
