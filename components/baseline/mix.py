"""Text and co-occurrence mixed without training, as in STAR (Lee et al., arXiv 2410.16458).

    history(i)     = Σ_p d^p · (a · cos(text_p, text_i) + (1 − a) · similarity(p, i)) / Σ_p d^p
    search(q, i)   = history(i) + t · cos(text_q, text_i) + b · BM25F(q, i) / greatest BM25F of the query's words
                   + c · [q names a category of i, at any level]

p runs over the history from its newest item, p = 0; similarity is that of item-kNN. a, d, and for examples with a query
t, b and c, are chosen on validation. Departures: no ratings, and the query, which STAR does not have.
"""

import numpy as np
import scipy.sparse as sp
import torch

from components.baseline.bm25f import TIE, Bm25f
from components.baseline.data import Dataset, Ints, newest
from components.baseline.query_match import NameMatch
from components.baseline.text import TextFeatures


class HistoryMix:
    """What is like the history, in its text and by who had both."""

    def __init__(
        self, data: Dataset, text: TextFeatures, similarity: sp.csr_array, *, text_share: float, decay: float
    ) -> None:
        self.data = data
        self.text = text
        self.similarity = similarity
        self.text_share = text_share
        self.decay = decay

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]; the same for all tasks of a context, popularity alone without any."""
        contexts, num_items = self.data.contexts, len(self.data.items)
        distinct, position = np.unique(self.data.examples.contexts[rows], return_inverse=True)
        flat, owner, rank = newest(contexts, distinct, num_items)
        weights = np.float32(self.decay) ** rank.astype(np.float32)
        weights /= np.bincount(owner, weights, len(distinct)).astype(np.float32)[owner]
        histories = sp.csr_array((weights, (owner, contexts.items[flat])), shape=(len(distinct), num_items))
        alike = (histories @ self.text.items) @ self.text.items.T
        together = (histories @ self.similarity).toarray()
        scores = self.text_share * alike + (1 - self.text_share) * together + TIE * self.data.items.popularity
        return torch.from_numpy(scores.astype(np.float32)[position])


class SearchMix:
    """What is like the history and fits the query; for examples with a query."""

    def __init__(
        self,
        history: HistoryMix,
        words: Bm25f,
        text: TextFeatures,
        *,
        query_text: float,
        query_words: float,
        query_category: float,
    ) -> None:
        self.history = history
        self.words = words
        self.text = text
        self.categories = NameMatch(history.data.items.categories, history.data.examples.queries)
        self.query_text = query_text
        self.query_words = query_words
        self.query_category = query_category

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]."""
        query = self.history.data.examples.query[rows]
        fit = self.words.index.share(self.words.queries[query])
        fit = self.query_words * fit + self.query_category * self.categories.of(query)
        alike = self.query_text * (self.text.queries[query] @ self.text.items.T)
        return self.history.score(rows) + torch.from_numpy((alike + fit.toarray()).astype(np.float32))
