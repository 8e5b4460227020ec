"""Item-to-item nearest neighbours: shrunken cosine of co-occurrence in the baskets of a user's window.

    sim(i, j) = n_ij / (sqrt(n_i · n_j) + shrinkage)

with n_ij the training baskets that hold both; an item is its own neighbour, so that repeats count.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp
import torch

from components.baseline.data import Dataset, Ints, find, gather
from components.baseline.rules import history_weights
from components.baseline.schema import user_fold
from components.config import SplitConfig


@dataclass(frozen=True)
class Baskets:
    """What users had together.

    Attributes:
        matrix: Binary baskets × catalogue.
        folds: Fold of each basket's user, see `schema.user_fold`.
    """

    matrix: sp.csr_array
    folds: Ints

    def without(self, fold: int) -> sp.csr_array:
        """The baskets of all other folds."""
        return sp.csr_array(self.matrix[np.flatnonzero(self.folds != fold)])


def read_baskets(events: Path, item_ids: Ints, split: SplitConfig) -> Baskets:
    """What a user had in one window of the training period.

    Leave-one-out has one event a window: there, a basket is all that a user had.

    Args:
        events: Folder of the validated events.
        item_ids: Catalogue, ascending.
        split: Windows are aligned to its first training cut; events of the validation period on are not read.
    """
    table = ds.dataset(events, partitioning="hive").to_table(
        columns=["user_id", "item_id", "ts"], filter=pc.field("ts") < pc.scalar(split.validation_start)
    )
    encoded = pc.dictionary_encode(table.column("user_id").combine_chunks())
    users = encoded.indices.to_numpy().astype(np.int64)
    user_folds = np.array([user_fold(user_id) for user_id in encoded.dictionary.to_pylist()], dtype=np.int64)
    instants = table.column("ts").to_numpy()
    start = np.datetime64(split.train_start.replace(tzinfo=None), "us")
    windows = np.floor((instants - start) / np.timedelta64(split.window)).astype(np.int64)
    if split.kind == "leave_one_out":
        windows[:] = 0
    items = find(item_ids, table.column("item_id").to_numpy())
    keep = items >= 0
    windows -= windows.min(initial=0)
    keys = users * (windows.max(initial=0) + 1) + windows
    _, first, baskets = np.unique(keys[keep], return_index=True, return_inverse=True)
    shape = (len(first), len(item_ids))
    matrix = sp.csr_array((np.ones(len(baskets), dtype=np.float32), (baskets, items[keep])), shape=shape)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return Baskets(matrix, user_folds[users[keep][first]])


def count_pairs(baskets: sp.csr_array) -> sp.csr_array:
    """n_ij, the baskets that hold both items, shape [catalogue, catalogue]; the diagonal is n_ii = n_i."""
    return sp.csr_array(baskets.T @ baskets)


def shrunken_cosine(pairs: sp.csr_array, shrinkage: float) -> sp.csr_array:
    """Similarity of co-occurring items, shape [catalogue, catalogue]."""
    roots = np.sqrt(pairs.diagonal()).astype(np.float32)
    rows = np.repeat(np.arange(pairs.shape[0]), np.diff(pairs.indptr))
    similarity = pairs.data / (roots[rows] * roots[pairs.indices] + np.float32(shrinkage))
    return sp.csr_array((similarity, pairs.indices, pairs.indptr), shape=pairs.shape)


class ItemKnn:
    """Sum over the history of similarity × history weight."""

    def __init__(self, data: Dataset, similarity: sp.csr_array, shrinkage: float, half_life_days: float) -> None:
        self.data = data
        self.similarity = similarity
        self.shrinkage = shrinkage
        self.half_life_days = half_life_days

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]; the same for all tasks of a context, -inf without any evidence."""
        contexts = self.data.contexts
        distinct, position = np.unique(self.data.examples.contexts[rows], return_inverse=True)
        flat, owner = gather(np.arange(len(contexts.items)), contexts.offsets, distinct)
        weights = history_weights(contexts.counts[flat], contexts.days[flat], self.half_life_days)
        shape = (len(distinct), len(self.data.items))
        histories = sp.csr_array((weights, (owner, contexts.items[flat])), shape=shape)
        scores = (histories @ self.similarity).toarray()
        return torch.from_numpy(np.where(scores > 0, scores, -np.inf).astype(np.float32)[position])
