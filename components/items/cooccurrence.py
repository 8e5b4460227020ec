"""Item-to-item similarity: shrunken cosine of what goes together, or follows, in the training period.

    sim(i, j) = n_ij / (sqrt(n_i · n_j) + shrinkage)

Where users have baskets, n_ij counts those that hold both. Where they have sequences, every later item j of a user
counts GAP_DECAY^(gap - 1) for i, and every earlier one `backward` times that. An item is its own neighbour, so that
repeats count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from components.config import SplitConfig

Ints = npt.NDArray[np.int64]

GAP_DECAY = 0.8
SEQUENCE_REACH = 50

Columns = tuple[npt.NDArray[np.int32], ...]  # user, window and item of events


@dataclass(frozen=True)
class Baskets:
    """What users had together, by user and time."""

    matrix: sp.csr_array  # binary baskets × catalogue
    users: Ints  # number of each basket's user, ascending; a user's baskets from the oldest to the newest
    reach: int  # how many baskets later an item still counts as following; 0: only what is in one basket goes together

    def of_items(self, columns: Ints) -> Baskets:
        """The same baskets with some of the items only."""
        return Baskets(sp.csr_array(self.matrix[:, columns]), self.users, self.reach)


def read_baskets(events: Path, item_ids: Ints, split: SplitConfig, until: datetime) -> Baskets:
    """What a user had in one window of the time before `until`; leave-one-out has one event per window.

    Items that are not among the ascending `item_ids` are left out; windows are aligned to the first training cut.
    """
    start = np.datetime64(split.train_start.replace(tzinfo=None), "us")
    numbers: dict[str, int] = {}  # of the users, in the order in which they come first
    # Narrow, and batch after batch: memory is what limits the log.
    columns: list[Columns] = [(np.empty(0, np.int32),) * 3]
    for batch in ds.dataset(events, partitioning="hive").to_batches(
        columns=["user_id", "item_id", "ts"], filter=pc.field("ts") < pc.scalar(until)
    ):
        named = pc.dictionary_encode(batch.column("user_id"))
        users = np.array([numbers.setdefault(name, len(numbers)) for name in named.dictionary.to_pylist()], np.int32)
        bought = batch.column("item_id").to_numpy()
        places = np.minimum(np.searchsorted(item_ids, bought), len(item_ids) - 1)
        known = item_ids[places] == bought
        passed = np.floor((batch.column("ts").to_numpy() - start) / np.timedelta64(split.window))
        found = (users[named.indices.to_numpy()], passed.astype(np.int32), places.astype(np.int32))
        columns.append(tuple(column[known] for column in found))
    first = min(int(windows.min(initial=0)) for _, windows, _ in columns)
    num_windows = max(int(windows.max(initial=0)) for _, windows, _ in columns) - first + 1
    codes = np.concatenate(
        [
            (users.astype(np.int64) * num_windows + (windows - first)) * len(item_ids) + items
            for users, windows, items in _taken(columns)
        ]
    )
    return _group(codes, num_windows, len(item_ids), SEQUENCE_REACH if split.kind == "leave_one_out" else 0)


def _taken(columns: list[Columns]) -> Iterator[Columns]:
    """The elements, each of which leaves the list."""
    columns.reverse()
    while columns:
        yield columns.pop()


def _group(codes: Ints, num_windows: int, num_items: int, reach: int) -> Baskets:
    """Baskets of events, each coded as (user · windows + window) · items + item; the codes are sorted in place.

    A window lasts a day at least, so that the codes of any shop's log have less than 63 bits.
    """
    codes.sort()
    codes = codes[np.concatenate([[True], codes[1:] != codes[:-1]])[: len(codes)]]
    items = (codes % num_items).astype(np.int32)
    codes //= num_items
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])[: len(codes)])
    offsets = np.append(starts, len(codes))
    matrix = sp.csr_array((np.ones(len(items), np.float32), items, offsets), shape=(len(starts), num_items))
    return Baskets(matrix, codes[starts] // num_windows, reach)


def count_pairs(baskets: Baskets, backward: float) -> sp.csr_array:
    """n_ij, how often j came with i or after it, shape [catalogue, catalogue]; the diagonal is n_ii = n_i.

    Where baskets reach forward, j *before* i counts `backward`; 1 makes n symmetric.
    """
    matrix = baskets.matrix
    if baskets.reach == 0:
        return sp.csr_array(matrix.T @ matrix)
    pairs = sp.csr_array((matrix.shape[1], matrix.shape[1]), dtype=np.float32)
    for gap in range(1, baskets.reach + 1):
        earlier = np.flatnonzero(baskets.users[:-gap] == baskets.users[gap:])
        if not len(earlier):
            break
        later = sp.csr_array(matrix[earlier].T @ matrix[earlier + gap]) * np.float32(GAP_DECAY ** (gap - 1))
        pairs = pairs + later + np.float32(backward) * later.T
    counts = np.asarray(matrix.sum(axis=0), dtype=np.float32)
    total = sp.csr_matrix(pairs - sp.diags_array(pairs.diagonal()) + sp.diags_array(counts))
    total.sum_duplicates()
    return sp.csr_array(total)


def shrunken_cosine(pairs: sp.csr_array, shrinkage: float) -> sp.csr_array:
    """Similarity of co-occurring items, shape [catalogue, catalogue]."""
    roots = np.sqrt(pairs.diagonal()).astype(np.float32)
    rows = np.repeat(np.arange(pairs.shape[0]), np.diff(pairs.indptr))
    similarity = pairs.data / (roots[rows] * roots[pairs.indices] + np.float32(shrinkage))
    return sp.csr_array((similarity, pairs.indices, pairs.indptr), shape=pairs.shape)
