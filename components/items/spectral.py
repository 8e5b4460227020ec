"""ID vectors of items from co-occurrence: the singular vectors of the item-to-item similarity.

    S ≈ U Σ Vᵀ,    as history h = c · U Σ^(1/2),    as candidate x = c · V Σ^(1/2)

so that h_i · x_j is, up to the constant c², the best approximation of sim(i, j) of that width (Eckart and Young
1936): how well candidate j follows i. c gives candidates a root mean square length of one.

Vectors of two similarities live in different bases. A rotation (orthogonal Procrustes, Schönemann 1966) brings one
towards the other, changes no inner product, and lets one model read both.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from scipy.linalg import orthogonal_procrustes
from sklearn.utils.extmath import randomized_svd

Floats = npt.NDArray[np.float32]
POWER_ITERATIONS = 4


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of n items in both roles.

    Attributes:
        candidate: float32 [n, d].
        history: float32 [n, d].
        present: Which items have a neighbour [n]; the others' vectors are zero.
    """

    candidate: Floats
    history: Floats
    present: npt.NDArray[np.bool_]


def factorise(similarity: sp.csr_array, dimension: int, seed: int) -> ItemVectors:
    """Vectors of the items by a similarity.

    Args:
        similarity: [n, n], earlier item × later item; the diagonal is ignored.
        dimension: Width; above the rank of the matrix, the rest is zero.
        seed: Of the random projection (Halko et al. 2011).
    """
    matrix = _without_diagonal(similarity)
    num_items = matrix.shape[0]
    history, candidate = (np.zeros((num_items, dimension), dtype=np.float32) for _ in range(2))
    present = (np.diff(matrix.indptr) > 0) | (np.diff(sp.csr_array(matrix.T).indptr) > 0)
    if present.any():
        left, values, right = randomized_svd(
            matrix,
            min(dimension, num_items),
            n_iter=POWER_ITERATIONS,
            random_state=seed,
            power_iteration_normalizer="QR",
        )
        width = len(values)
        history[:, :width], candidate[:, :width] = left * np.sqrt(values), right.T * np.sqrt(values)
        history[~present], candidate[~present] = 0, 0
        scale = 1 / np.sqrt(np.square(candidate[present]).sum(axis=1).mean())
        history, candidate = history * scale, candidate * scale
    return ItemVectors(candidate, history, present)


def rotate(vectors: ItemVectors, towards: ItemVectors) -> ItemVectors:
    """The same vectors, rotated to be as close as possible to others of their width."""
    both, target = (np.concatenate([part.history, part.candidate]) for part in (vectors, towards))
    rotation = orthogonal_procrustes(both, target)[0].astype(np.float32)
    return ItemVectors(vectors.candidate @ rotation, vectors.history @ rotation, vectors.present)


def _without_diagonal(similarity: sp.csr_array) -> sp.csr_array:
    matrix = sp.csr_array(similarity - sp.diags_array(similarity.diagonal()))
    matrix.eliminate_zeros()
    return matrix
