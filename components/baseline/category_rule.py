"""The rule of a shop's category page: items of the asked category first, then all others; neighbours, then counts.

Within both parts items are ordered by item-kNN, and where it knows nothing by how often they are targets of the task.
A query that is no category, or no query at all, leaves neighbours and counts.
"""

import numpy as np
import scipy.sparse as sp
import torch

from components.baseline.data import Dataset, Ints, Items, split_words
from components.baseline.ranking import Scorer
from components.baseline.rules import Popularity

TIE = 1e-6  # of equal neighbours the more frequent target is first


class CategoryMatch:
    """Which items are in the category that a query names: equal in their words, at any level or as the leaf."""

    def __init__(self, items: Items, queries: tuple[str, ...], *, leaf_only: bool) -> None:
        paths = [path[-1:] if leaf_only else path for path in items.categories]
        names = {name: tuple(split_words(name)) for path in paths for name in path}
        codes = {words: code for code, words in enumerate(sorted(set(names.values())))}
        pairs = {(codes[names[name]], item) for item, path in enumerate(paths) for name in path}
        category, item_of = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
        shape = (len(codes) + 1, len(items))  # the last row is that of queries which name no category
        self.members = sp.csr_array((np.ones(len(pairs), np.float32), (category, item_of)), shape=shape)
        self.category: Ints = np.array(
            [codes.get(tuple(split_words(query)), len(codes)) for query in queries] + [len(codes)], dtype=np.int64
        )

    def of(self, query: Ints) -> sp.csr_array:
        """1 for the items of each query's category, sparse [len(query), n]; -1 stands for no query."""
        return sp.csr_array(self.members[self.category[query]])


class CategoryRule:
    """Category, then neighbours, then counts."""

    def __init__(self, data: Dataset, neighbours: Scorer, popularity: Popularity, leaf_only: float) -> None:
        self.data = data
        self.neighbours = neighbours
        self.popularity = popularity
        self.match = CategoryMatch(data.items, data.examples.queries, leaf_only=bool(leaf_only))

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
