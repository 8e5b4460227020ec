import math

import torch

from components.items.ramps import POPULARITY_KNOTS, popularity_features


def test_weights_of_popularity_are_the_slopes_between_the_knots() -> None:
    counts = torch.tensor([0.0, 1.0, 2.0, 3.0, 1e9])
    features = popularity_features(torch.log1p(counts)[:, None])
    slopes = torch.arange(POPULARITY_KNOTS).float() + 1
    between = math.log2(3) - 1  # how far two baskets lie from the knot of one to that of three
    expected = torch.tensor([0, 1, 1 + between * 2, 3, slopes.sum()])
    torch.testing.assert_close(features @ slopes, expected)
