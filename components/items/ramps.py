"""Counts as features whose weights make a piecewise linear function of the logarithm, for URM and target attention.

G counts of popularity (popularity.py) · m ramps for each doubling · R = G · m · DOUBLINGS ramps in all
"""

import math

import torch

DOUBLINGS = 12  # that have ramps; the last one, from 2,047 baskets, has no end


def num_ramps(num_counts: int, per_doubling: int) -> int:
    """R for G counts."""
    return num_counts * DOUBLINGS * per_doubling


def ramp_features(log_counts: torch.Tensor, per_doubling: int, *, bounded: bool = False) -> torch.Tensor:
    """Progress of each log(1 + baskets) [n, G] along each of its ramps, from 0 to 1 [n, R].

    Ramp k leads from 2^(k/m) - 1 to 2^((k+1)/m) - 1 baskets; the last one goes on, unless `bounded`. Weights of such
    features are slopes.
    """
    place = log_counts * (per_doubling / math.log(2))
    ends = torch.ones(DOUBLINGS * per_doubling, device=log_counts.device)
    ends[-1] = 1 if bounded else math.inf
    progress = place[..., None] - torch.arange(len(ends), device=log_counts.device)
    return progress.clamp(min=0).minimum(ends).flatten(1)


def logarithm_slopes(gains: list[float], per_doubling: int) -> torch.Tensor:
    """Weights [R] that make Σ gain · log(1 + baskets) of the features of G counts, for G gains."""
    slopes = torch.tensor(gains) * (math.log(2) / per_doubling)
    return slopes.repeat_interleave(DOUBLINGS * per_doubling)
