"""ID vectors of items from co-occurrence: the leading eigenvectors of the item-to-item similarity.

    S ≈ V Λ Vᵀ (largest eigenvalues, none below zero),   x = c · S V Λ^(-1/2) = c · V Λ^(1/2)

so that x_i · x_j is, up to the constant c², the best approximation of sim(i, j) of that width (Eckart and Young 1936);
c makes the root mean square length one. An item without a neighbour has no vector.

A model that trains on a user's own next item must not see vectors that were computed from that very event: it would
learn to trust them more than they deserve, most of all for rare items. The vectors *of a fold* are therefore
c · S' V Λ^(-1/2) with S' counted without the users of the fold, on the same basis V: out-of-fold features, as in
stacking (Wolpert 1992).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.utils.extmath import randomized_svd

Floats = npt.NDArray[np.float32]
POWER_ITERATIONS = 4
SMALLEST_SHARE = 1e-6  # of the largest eigenvalue; what is smaller is rounding


@dataclass(frozen=True)
class SpectralBasis:
    """Where similarities are projected to.

    Attributes:
        projection: c · V Λ^(-1/2), float32 [n, d].
    """

    projection: Floats

    @classmethod
    def fit(cls, similarity: sp.csr_array, dimension: int, seed: int) -> Self:
        """The basis of a similarity.

        Args:
            similarity: Symmetric [n, n]; the diagonal is ignored.
            dimension: Width wanted; fewer where the matrix has fewer positive eigenvalues.
            seed: Of the random projection (Halko et al. 2011).
        """
        matrix = _without_diagonal(similarity)
        left, values, right = randomized_svd(
            matrix,
            min(dimension, matrix.shape[0]),
            n_iter=POWER_ITERATIONS,
            random_state=seed,
            power_iteration_normalizer="QR",
        )
        same_sign = (left * right.T).sum(axis=0) > 0  # singular vectors of opposite signs: a negative eigenvalue
        kept = same_sign & (values > SMALLEST_SHARE * values[0])
        projection = left[:, kept] / np.sqrt(values[kept])
        vectors = matrix @ projection
        present = np.diff(matrix.indptr) > 0
        length = float(np.sqrt(np.square(vectors[present]).sum(axis=1).mean())) if present.any() else 1.0
        return cls((projection / length).astype(np.float32))

    def vectors(self, similarity: sp.csr_array) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Vectors [n, d], zero for items without a neighbour in this similarity, and who has one [n]."""
        matrix = _without_diagonal(similarity)
        return np.asarray(matrix @ self.projection, dtype=np.float32), np.diff(matrix.indptr) > 0


def _without_diagonal(similarity: sp.csr_array) -> sp.csr_array:
    matrix = sp.csr_array(similarity - sp.diags_array(similarity.diagonal()))
    matrix.eliminate_zeros()
    return matrix
