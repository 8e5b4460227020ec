"""The ID model alone (components/items/id_network.py), as a ranker.

    score(user, j) = s · (Σ_p w_p h_p) · x_j + β · log(1 + count_j),   w_p ∝ age_p^(-δ), of sum one

h and x are the ID vectors of the item table in both roles, s the scale that they are stored with, and age counts the
user's baskets back from the newest one. δ and β are parameters of the network that the table does not keep; here they
are chosen on validation. The model knows neither task nor query.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch

from components.baseline.data import Contexts, Dataset, Floats, Ints, newest
from components.items.id_network import REACH
from components.items.id_vectors import URM_SCALE
from components.items.table import HISTORY_ROLE, POPULARITY, ItemTable


class FrozenIds(NamedTuple):
    """ID vectors of the catalogue, zero where an item has none."""

    candidate: Floats  # [n, d]
    history: Floats  # [n, d]
    log_count: Floats  # log(1 + baskets), [n]


def read_ids(item_table: Path, item_ids: Ints) -> FrozenIds:
    """ID vectors and counts of the items from an item table.

    Raises:
        DataError: The table has no ID vectors.
    """
    table = ItemTable.open(item_table)
    candidate, history, counts = (table.gather(name, item_ids)[0] for name in ("id", "id" + HISTORY_ROLE, POPULARITY))
    return FrozenIds(candidate, history, counts[:, 0])


class IdVectors:
    """Scores by the frozen vectors."""

    def __init__(
        self, data: Dataset, ids: FrozenIds, window_days: float, *, age_decay: float, popularity: float
    ) -> None:
        self.data = data
        self.ids = ids
        self.window_days = window_days
        self.age_decay = age_decay
        self.popularity = popularity

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]; the same for all tasks of a context."""
        contexts = self.data.contexts
        distinct, position = np.unique(self.data.examples.contexts[rows], return_inverse=True)
        flat, owner, _ = newest(contexts, distinct, REACH)
        weights = basket_ages(contexts, flat, owner, self.window_days) ** np.float32(-self.age_decay)
        weights /= np.bincount(owner, weights, len(distinct)).astype(np.float32)[owner]
        shape = (len(distinct), len(self.data.items))
        users = sp.csr_array((weights, (owner, contexts.items[flat])), shape=shape) @ self.ids.history
        scores = URM_SCALE * users @ self.ids.candidate.T + self.popularity * self.ids.log_count
        return torch.from_numpy(scores.astype(np.float32)[position])


def basket_ages(contexts: Contexts, flat: Ints, owner: Ints, window_days: float) -> Floats:
    """How many baskets back each history item is, 1 for the newest basket.

    Args:
        contexts: With the histories.
        flat: Places of history items in their columns, newest first within a context.
        owner: Context of each, ascending.
        window_days: What a user has within so many days is one basket.
    """
    window = np.floor(contexts.days[flat] / window_days).astype(np.int64)
    first = np.concatenate([[True], owner[1:] != owner[:-1]])[: len(flat)]
    older = np.concatenate([[True], window[1:] != window[:-1]])[: len(flat)] | first
    number = np.cumsum(older)
    ages: Floats = (number - number[first][np.cumsum(first) - 1] + 1).astype(np.float32)
    return ages
