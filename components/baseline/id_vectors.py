"""The folder `id_vectors`: ID vectors of all users, and for each fold those that know nothing of its users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.sparse as sp

from components.baseline.data import Ints
from components.baseline.item_knn import Baskets, count_pairs, shrunken_cosine
from components.baseline.schema import USER_FOLDS
from components.baseline.spectral import SpectralBasis


def write_id_vectors(
    folder: Path, item_ids: Ints, baskets: Baskets, *, shrinkage: float, dimension: int, seed: int
) -> None:
    """Write keys.npy int64 [m] and vectors.npy float32 [m, d] of the items with a neighbour; a sub-folder a fold.

    Args:
        folder: Made here.
        item_ids: Catalogue, in the order of the baskets' columns.
        baskets: What users had together in training.
        shrinkage: Of the similarity, see item_knn.py.
        dimension: Width wanted.
        seed: Of the random projection.
    """
    similarity = shrunken_cosine(count_pairs(baskets.matrix), shrinkage)
    basis = SpectralBasis.fit(similarity, dimension, seed)
    _write(folder, item_ids, basis, similarity)
    for fold in range(USER_FOLDS):
        without = shrunken_cosine(count_pairs(baskets.without(fold)), shrinkage)
        _write(folder / f"fold_{fold}", item_ids, basis, without)


def _write(folder: Path, item_ids: Ints, basis: SpectralBasis, similarity: sp.csr_array) -> None:
    vectors, present = basis.vectors(similarity)
    folder.mkdir()
    np.save(folder / "keys.npy", item_ids[present])
    np.save(folder / "vectors.npy", vectors[present])
