"""Item-to-item nearest neighbours over the similarity of `components.items.cooccurrence`."""

import numpy as np
import scipy.sparse as sp
import torch

from components.baseline.data import Dataset, Ints, places
from components.baseline.rules import history_weights


class ItemKnn:
    """Sum over the history of similarity × history weight."""

    def __init__(self, data: Dataset, similarity: sp.csr_array, half_life_days: float) -> None:
        self.data = data
        self.similarity = similarity
        self.half_life_days = half_life_days

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]; the same for all tasks of a context, -inf without any evidence."""
        contexts = self.data.contexts
        distinct, position = np.unique(self.data.examples.contexts[rows], return_inverse=True)
        flat, owner = places(contexts.offsets, distinct)
        weights = history_weights(contexts.counts[flat], contexts.days[flat], self.half_life_days)
        shape = (len(distinct), len(self.data.items))
        histories = sp.csr_array((weights, (owner, contexts.items[flat])), shape=shape)
        scores = (histories @ self.similarity).toarray()
        return torch.from_numpy(np.where(scores > 0, scores, -np.inf).astype(np.float32)[position])
