"""Counts as features whose weights make a piecewise linear function of the logarithm, for URM and target attention.

G counts of popularity (popularity.py) · K knots of each
"""

import math

import torch

POPULARITY_KNOTS = 12  # K; knot k lies at 2ᵏ - 1 baskets


def popularity_features(log_counts: torch.Tensor) -> torch.Tensor:
    """Progress of each log(1 + baskets) [n, G] from each knot to the next, from 0 to 1 [n, G·K].

    Weights of such features are slopes.
    """
    place = log_counts / math.log(2)
    knots = torch.arange(POPULARITY_KNOTS, device=log_counts.device)
    return (place[..., None] - knots).clamp(min=0, max=1).flatten(1)
