"""ID vectors and popularity of items by what users had, at two instants.

A model that trains on what a user does next must not see vectors that were computed from that very event: it would
learn to trust them more than they deserve, most of all for rare items. Nor is it enough to leave his events out: what
is bought last has less company in the log than what was bought long ago, so that vectors of the whole training window
say more about its own targets than they will say about those that come after it. Vectors for training are therefore
counted up to the newest training cuts, and URM trains on these cuts alone; vectors for inference are counted up to
the end of the training window. ADR 6 has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from components.config import FeaturesConfig
from components.items.cooccurrence import Baskets, Ints, count_pairs, read_baskets, shrunken_cosine
from components.items.spectral import ItemVectors, factorise, rotate

NEIGHBOURS = 200  # kept an item: beyond them similarity is small, and time and memory grow with their number
SHRINKAGE, BACKWARD = 10.0, 0.5  # chosen on validation of Amazon Beauty, see docs/results.md


@dataclass(frozen=True)
class KnownItems:
    """What is known of n items before an instant.

    Attributes:
        vectors: ID vectors in both roles.
        log_count: log(1 + baskets that hold the item), float32 [n]; see cooccurrence.py for what a basket is.
    """

    vectors: ItemVectors
    log_count: npt.NDArray[np.float32]


def know_items(
    events: Path, item_ids: Ints, features: FeaturesConfig, *, until: datetime, dimension: int, seed: int
) -> KnownItems:
    """Compute ID vectors and popularity from the events before an instant.

    Args:
        events: Folder of the validated events.
        item_ids: Items, ascending [n].
        features: For the split, and how many events an item needs for a vector.
        until: Events from then on are not read.
        dimension: Width of the vectors.
        seed: Of the random projection.
    """
    baskets = read_baskets(events, item_ids, features.split, until)
    counts = np.asarray(baskets.matrix.sum(axis=0), dtype=np.float32)
    frequent = np.flatnonzero(counts >= max(1, features.min_item_events))
    part = spectral_vectors(baskets.of_items(frequent), dimension, seed)
    candidate, history = (np.zeros((len(item_ids), dimension), dtype=np.float32) for _ in range(2))
    present = np.zeros(len(item_ids), dtype=bool)
    candidate[frequent], history[frequent], present[frequent] = part.candidate, part.history, part.present
    return KnownItems(ItemVectors(candidate, history, present), np.log1p(counts))


def turn(known: KnownItems, towards: KnownItems) -> KnownItems:
    """The same, its vectors rotated towards others, so that one model reads both."""
    return KnownItems(rotate(known.vectors, towards.vectors), known.log_count)


def spectral_vectors(baskets: Baskets, dimension: int, seed: int) -> ItemVectors:
    """Vectors of the baskets' columns."""
    similarity = shrunken_cosine(count_pairs(baskets, BACKWARD), SHRINKAGE)
    return factorise(sp.csr_array(similarity * nearest(similarity, NEIGHBOURS)), dimension, seed)


def nearest(similarity: sp.csr_array, number: int) -> sp.csr_array:
    """Ones at the diagonal and at the largest entries of each row, `number` of them."""
    columns = []
    for row in range(similarity.shape[0]):
        span = slice(similarity.indptr[row], similarity.indptr[row + 1])
        indices, values = similarity.indices[span], similarity.data[span]
        if len(indices) > number:
            indices = indices[np.argpartition(-values, number - 1)[:number]]
        columns.append(np.union1d(indices, [row]))
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in columns])]).astype(np.int64)
    indices = np.concatenate([np.empty(0, dtype=np.int64), *columns]).astype(np.int64)
    return sp.csr_array((np.ones(len(indices), dtype=np.float32), indices, offsets), shape=similarity.shape)
