"""User vectors of requests, and the score of an item for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from components.urm.data.request import Floats, Ids


@dataclass(frozen=True, eq=False)
class UserVectors:
    """H vectors per request, and copy scores of its history items.

    n requests · H user vectors · d width · v vector of an item

        score(r, item) = combine over h of vectors[r, h] · v(item)  +  copy_scores[r][i] if the item is copy_items[r][i]
    """

    vectors: Floats  # float32 [n, H, d]
    copy_items: Sequence[Ids]  # distinct history items of each request that the copy path reaches
    copy_scores: Sequence[Floats]  # float32, one per item of `copy_items`

    def __len__(self) -> int:
        """Number of requests."""
        return len(self.vectors)

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Whether all numbers of each request are finite [n]."""
        copies = [bool(np.isfinite(scores).all()) for scores in self.copy_scores]
        return np.asarray(np.isfinite(self.vectors).all(axis=(1, 2)) & np.array(copies, dtype=bool))

    def select(self, numbers: Sequence[int]) -> UserVectors:
        """The user vectors of some requests, in the order given."""
        return UserVectors(
            self.vectors[list(numbers)],
            [self.copy_items[number] for number in numbers],
            [self.copy_scores[number] for number in numbers],
        )

    def of_one_vector(self, number: int) -> UserVectors:
        """The same requests with one of the H vectors only."""
        return UserVectors(self.vectors[:, number : number + 1], self.copy_items, self.copy_scores)


Combine = Literal["max", "logsumexp", "mean"]


def combine_scores(scores: torch.Tensor, how: Combine) -> torch.Tensor:
    """One score [...] of H inner products [..., H].

    `logsumexp` is reduced by log H, so that H equal products give that product under all three.
    """
    if how == "max":
        return scores.amax(dim=-1)
    if how == "mean":
        return scores.mean(dim=-1)
    return torch.logsumexp(scores, dim=-1) - math.log(scores.shape[-1])
