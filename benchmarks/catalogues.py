"""Large catalogues that look like a real one: its own items first, then mixtures of them, block by block.

    μ, x_i     mean and vectors of the real items
    new item   μ + √(1 - t²) (x_a - μ) + t (x_b - μ),  a, b real items drawn at random, t uniform in [.2, .7];
               popularity of a

A mixture keeps the spectrum of the real vectors, which is what an index compresses, and stays near its first parent, so
that items lie in clusters as variants of a product do. Popularity, which is length here, keeps its distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

BLOCK = 20_000
MIXED = (0.2, 0.7)


@dataclass(frozen=True)
class Catalogue:
    """A catalogue of `size` items; each block is a function of seed and place alone.

    Attributes:
        keys: Ids of the real items, ascending.
        vectors: Their vectors [real, d].
        popularity: Numbers at the end of each vector that are its popularity.
        size: Items in all, at least the real ones.
        seed: Of the mixtures.
    """

    keys: Ids
    vectors: Floats
    popularity: int
    size: int
    seed: int = 0

    @property
    def item_ids(self) -> Ids:
        """All ids, ascending [size]."""
        return np.concatenate([self.keys, self.keys[-1] + 1 + np.arange(self.size - len(self.keys))])

    def blocks(self) -> Iterator[Floats]:
        """Vectors of all items, in the order of the ids."""
        for start in range(0, len(self.keys), BLOCK):
            yield np.asarray(self.vectors[start : start + BLOCK], dtype=np.float32)
        mean = self.vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
        for start in range(len(self.keys), self.size, BLOCK):
            yield self._mix(min(BLOCK, self.size - start), mean, start)

    def _mix(self, number: int, mean: Floats, start: int) -> Floats:
        random = np.random.default_rng([self.seed, start])
        first, second = random.integers(len(self.keys), size=(2, number))
        share = random.uniform(*MIXED, size=(number, 1)).astype(np.float32)
        kept = np.sqrt(1 - share**2)
        mixed = kept * self.vectors[first] + share * self.vectors[second] + (1 - kept - share) * mean
        mixed[:, -self.popularity :] = self.vectors[first, -self.popularity :]
        return mixed
