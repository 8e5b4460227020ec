"""In which fields a candidate matches a query: inputs of target attention's score (baseline.field_matches).

category    1 where the query names a category of the item, at any level
leaf        1 where it names the leaf
brand       1 where it names the brand
title       share of the query's words that the title has
words       BM25F over the three fields, as a share of the greatest for the query's words
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from components.baseline.bm25f import Bm25fIndex, Fields
from components.baseline.data import Dataset, Ints
from components.items.words import split_words

NUM_QUERY_MATCHES = 5


class NameMatch:
    """Which items a query names, by one of the names of each: equal in their words; a name without any is none."""

    def __init__(self, names: Sequence[Sequence[str]], queries: Sequence[str]) -> None:
        words = {name: tuple(split_words(name)) for of_item in names for name in of_item}
        codes = {name: code for code, name in enumerate(sorted(set(words.values()) - {()}))}
        pairs = {(codes[words[name]], item) for item, of_item in enumerate(names) for name in of_item if words[name]}
        code, item_of = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
        shape = (len(codes) + 1, len(names))  # the last row is that of queries which name nothing
        self.members = sp.csr_array((np.ones(len(pairs), np.float32), (code, item_of)), shape=shape)
        self.code: Ints = np.array(
            [codes.get(tuple(split_words(query)), len(codes)) for query in queries] + [len(codes)], dtype=np.int64
        )

    def of(self, query: Ints) -> sp.csr_array:
        """1 for the items that each query names, sparse [len(query), n]; -1 stands for no query."""
        return sp.csr_array(self.members[self.code[query]])


@dataclass(frozen=True)
class QueryMatches:
    """Match features of E examples with every item of the catalogue, sparse: zero without a query."""

    parts: tuple[sp.csr_array, ...]  # F features of the distinct queries, [q, n] each
    place: Ints  # row of each example in them, [E]

    def of_shared(self, items: Tensor) -> Tensor:
        """Features of items [m] for all examples, [E, m, F]."""
        columns = items.numpy()
        features = np.stack([part[:, columns].toarray() for part in self.parts], axis=-1)
        return torch.from_numpy(features[self.place])

    def of_own(self, items: Tensor) -> Tensor:
        """Features of each example's items [E, O], shape [E, O, F]."""
        columns = items.numpy()
        rows = np.broadcast_to(self.place[:, None], columns.shape)
        features = [np.asarray(part[rows.ravel(), columns.ravel()]).reshape(columns.shape) for part in self.parts]
        return torch.from_numpy(np.stack(features, axis=-1))

    def weighted(self, weights: Tensor) -> Tensor:
        """Sum of the features of all items by weights [E, F], shape [E, n]."""
        total = sum(
            sp.diags_array(weight) @ part[self.place]
            for weight, part in zip(weights.numpy().T, self.parts, strict=True)
        )
        return torch.from_numpy(sp.csr_array(total).toarray())


class QueryMatcher:
    """Computes the match features of queries."""

    def __init__(self, data: Dataset) -> None:
        items, queries = data.items, data.examples.queries
        self.names = [
            NameMatch(names, queries)
            for names in (
                items.categories,
                [path[-1:] for path in items.categories],
                [(brand,) if brand else () for brand in items.brands],
            )
        ]
        fields, words = Fields(items), [sorted(set(split_words(query))) for query in queries]
        counts = fields.count([*words, []])  # the last row, -1, is that of no query
        self.index = Bm25fIndex(fields, dict.fromkeys(fields.counts, 1.0))
        self.words: sp.csr_array = counts
        lengths = np.array([*(max(1, len(of_query)) for of_query in words), 1], dtype=np.float32)
        self.shares = sp.csr_array(sp.diags_array(1 / lengths) @ counts)
        self.in_title = sp.csr_array(fields.counts["title"].T > 0).astype(np.float32)  # [V, n]

    def of(self, query: Ints) -> QueryMatches:
        """Features of examples by the codes of their queries [E], -1 where there is none."""
        distinct, place = np.unique(query, return_inverse=True)
        parts = [names.of(distinct) for names in self.names]
        parts.append(sp.csr_array(self.shares[distinct] @ self.in_title))
        parts.append(self.index.share(self.words[distinct]))
        for part in parts:
            part.sum_duplicates()  # also sorts, which single items are looked up by
        return QueryMatches(tuple(part.astype(np.float32) for part in parts), place)
