"""What the model makes of requests: how any item scores for them."""

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
    """H vectors a request, and what the very items of its history score beside them (ADR 18).

    n requests · H user vectors · d width · v an item's vector

        score(r, item) = combine over h of vectors[r, h] · v(item)  +  copy_scores[r][i] if the item is copy_items[r][i]

    Attributes:
        vectors: float32 [n, H, d].
        copy_items: Distinct item ids of each request's history, as far as it can be copied from.
        copy_scores: float32, one for each of these items.
    """

    vectors: Floats
    copy_items: Sequence[Ids]
    copy_scores: Sequence[Floats]

    def __len__(self) -> int:
        """How many requests."""
        return len(self.vectors)

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """Of which requests all numbers are finite [n]."""
        own = [bool(np.isfinite(scores).all()) for scores in self.copy_scores]
        return np.asarray(np.isfinite(self.vectors).all(axis=(1, 2)) & np.array(own, dtype=bool))

    def select(self, numbers: Sequence[int]) -> UserVectors:
        """Those of some requests, in the order given."""
        return UserVectors(
            self.vectors[list(numbers)],
            [self.copy_items[number] for number in numbers],
            [self.copy_scores[number] for number in numbers],
        )

    def of_one_vector(self, number: int) -> UserVectors:
        """Those that have one of the H vectors only."""
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
