"""BM25F over title, category names and brand (Robertson, Zaragoza and Taylor 2004).

    tf(w, i)    = Σ_f weight_f · n(w, i, f) / (1 − b + b · length(i, f) / mean length(f))
    idf(w)      = log(1 + (N − n_w + 1/2) / (n_w + 1/2))
    score(q, i) = Σ_{w in q} idf(w) · tf(w, i) / (k1 + tf(w, i))

n(w, i, f) counts the word w in field f of item i, N the items, and n_w those with w in a field that has a weight. The
fields are summed before the term saturates, so that a word in two fields counts little more than in one. Lengths are
normalised per field, as in the authors' later form; with a weight for the title alone this is BM25 (Lucene's form).

Without a query the words of the newest items of the history are looked for, those of the fields that have a weight.
"""

import operator
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import scipy.sparse as sp
import torch

from components.baseline.data import Dataset, Floats, Ints, Items, newest
from components.items.words import split_words

K1, B = 1.5, 0.75
TIE = np.float32(1e-4)  # of equal scores the more popular item is first: far less than a word weighs

Weights = Mapping[str, float]  # of the fields; one that is not named has none


class Fields:
    """Word counts of each field of the items, over one vocabulary."""

    def __init__(self, items: Items) -> None:
        texts = {
            "title": [split_words(title) for title in items.titles],
            "category": [split_words(" ".join(path)) for path in items.categories],
            "brand": [split_words(brand) for brand in items.brands],
        }
        words = sorted({word for rows in texts.values() for row in rows for word in row})
        self.codes = {word: code for code, word in enumerate(words)}
        self.counts = {name: self.count(rows) for name, rows in texts.items()}  # [n, V] each

    def count(self, texts: Sequence[Sequence[str]]) -> sp.csr_array:
        """How often each text has each word, shape [texts, V]; unknown words are left out."""
        codes = [[self.codes[word] for word in words if word in self.codes] for words in texts]
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in codes])])
        flat = np.array([code for row in codes for code in row], dtype=np.int64)
        shape = (len(texts), len(self.codes))
        counts = sp.csr_array((np.ones(len(flat), dtype=np.float32), flat, offsets), shape=shape)
        counts.sum_duplicates()
        return counts


class Bm25fIndex:
    """BM25F of items for words."""

    def __init__(self, fields: Fields, weights: Weights) -> None:
        terms = [weight * _by_length(fields.counts[name]) for name, weight in weights.items() if weight]
        matrix = sp.csc_array(reduce(operator.add, terms))
        found = np.diff(matrix.indptr)
        self.idf: Floats = np.log1p((matrix.shape[0] - found + 0.5) / (found + 0.5)).astype(np.float32)
        matrix.data = matrix.data / (K1 + matrix.data) * np.repeat(self.idf, found)
        self.by_word: sp.csr_array = sp.csr_array(matrix.T)  # [V, n]

    def score(self, words: sp.csr_array) -> Floats:
        """Scores of all items, shape [texts, n], for word counts of shape [texts, V]."""
        scores: Floats = (words @ self.by_word).toarray().astype(np.float32)
        return scores

    def share(self, words: sp.csr_array) -> sp.csr_array:
        """The scores as a share of what an item could reach that has every word endlessly often, sparse [texts, n]."""
        greatest = np.maximum(words @ self.idf, np.float32(1e-6))
        return sp.csr_array(sp.diags_array(1 / greatest) @ (words @ self.by_word))


class Bm25f:
    """BM25F for the query, or, without one, for the words of the newest `history_items` items of the history."""

    def __init__(self, data: Dataset, fields: Fields, weights: Weights, history_items: float = 1) -> None:
        self.data = data
        self.index = Bm25fIndex(fields, weights)
        self.history_items = int(history_items)
        self.queries = fields.count([split_words(query) for query in data.examples.queries])
        self.item_words: sp.csr_array = reduce(
            operator.add, (fields.counts[name] for name, weight in weights.items() if weight)
        )

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]; -inf where no word fits."""
        scores = self.index.score(self._words(rows))
        found = scores > 0
        return torch.from_numpy(np.where(found, scores + TIE * self.data.items.popularity, -np.inf).astype(np.float32))

    def _words(self, rows: Ints) -> sp.csr_array:
        """What is looked for, word counts [len(rows), V]."""
        query = self.data.examples.query[rows]
        asked, unasked = np.flatnonzero(query >= 0), np.flatnonzero(query < 0)
        contexts = self.data.contexts
        flat, owner, _ = newest(contexts, self.data.examples.contexts[rows[unasked]], self.history_items)
        shape = (len(rows), len(self.data.items))
        histories = sp.csr_array((np.ones(len(flat), np.float32), (unasked[owner], contexts.items[flat])), shape=shape)
        words = sp.csr_array(histories @ self.item_words)
        if len(asked):
            shape = (len(rows), len(self.data.examples.queries))
            chosen = sp.csr_array((np.ones(len(asked), np.float32), (asked, query[asked])), shape=shape)
            words = words + chosen @ self.queries
        return words


def _by_length(counts: sp.csr_array) -> sp.csr_array:
    """Word counts of a field, divided by its length relative to the mean where there is one."""
    lengths = np.asarray(counts.sum(axis=1), dtype=np.float32)
    mean = lengths[lengths > 0].mean() if lengths.any() else 1.0
    return sp.csr_array(sp.diags_array((1 / (1 - B + B * lengths / mean)).astype(np.float32)) @ counts)
