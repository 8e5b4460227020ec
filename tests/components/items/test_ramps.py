import math

import pytest
import torch

from components.items.ramps import DOUBLINGS, logarithm_slopes, num_ramps, ramp_features


def test_weights_of_ramps_are_the_slopes_between_their_ends() -> None:
    counts = torch.tensor([0.0, 1.0, 2.0, 3.0, 4095.0])
    features = ramp_features(torch.log1p(counts)[:, None], 1)
    slopes = torch.arange(DOUBLINGS).float() + 1
    between = math.log2(3) - 1  # how far two baskets lie from the end of one ramp to that of the next
    expected = torch.tensor([0, 1, 1 + between * 2, 3, slopes.sum()])
    torch.testing.assert_close(features @ slopes, expected)


@pytest.mark.parametrize("per_doubling", [1, 4])
def test_the_last_ramp_has_no_end_unless_it_is_bounded(per_doubling: int) -> None:
    log_counts = torch.tensor([4095.0, 50_000.0, 5e6]).log1p()[:, None]
    slopes = logarithm_slopes([1.0], per_doubling)
    torch.testing.assert_close(ramp_features(log_counts, per_doubling) @ slopes, log_counts[:, 0])
    bounded = ramp_features(log_counts, per_doubling, bounded=True) @ slopes
    torch.testing.assert_close(bounded, log_counts[0].expand(3))


def test_more_ramps_tell_counts_apart_that_one_ramp_does_not() -> None:
    features = ramp_features(torch.log1p(torch.tensor([[52.0, 0.0], [54.0, 3.0]])), 4)
    assert features.shape == (2, num_ramps(2, 4)) == (2, 2 * DOUBLINGS * 4)
    below, above = features[:, : DOUBLINGS * 4]
    assert below[:22].eq(1).all() and 0.9 < below[22] < 1 and not below[23:].any()
    assert above[:23].eq(1).all() and 0 < above[23] < 0.2 and not above[24:].any()
    assert not features[0, DOUBLINGS * 4 :].any()
    torch.testing.assert_close(features[1, DOUBLINGS * 4 :].sum(), torch.tensor(8.0))


@pytest.mark.parametrize("per_doubling", [1, 4])
def test_equal_slopes_make_a_logarithm(per_doubling: int) -> None:
    log_counts = torch.log1p(torch.tensor([[0.0, 7.0], [41.0, 2.0], [900.0, 0.0]]))
    expected = 0.3 * log_counts[:, 0] - 2 * log_counts[:, 1]
    slopes = logarithm_slopes([0.3, -2.0], per_doubling)
    torch.testing.assert_close(ramp_features(log_counts, per_doubling) @ slopes, expected)
