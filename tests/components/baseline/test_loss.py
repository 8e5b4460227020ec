"""The sampled softmax against the full one, in closed form and in expectation."""

import numpy as np
import pytest
import torch

from components.baseline.loss import NegativeSampler, accidental_hits, sampled_softmax_loss

NOTHING = torch.empty(2, 0)


def test_without_negatives_it_is_the_softmax_over_the_own_candidates() -> None:
    scores = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    loss = sampled_softmax_loss(scores, NOTHING, torch.empty(0), targets)
    expected = -(scores.log_softmax(1) * targets).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item())


def test_a_masked_own_candidate_counts_for_nothing() -> None:
    scores = torch.tensor([[1.0, -torch.inf, 0.5], [0.0, -1.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    loss = sampled_softmax_loss(scores, NOTHING, torch.empty(0), targets)
    first = np.log(np.exp(1.0) + np.exp(0.5)) - 1.0
    second = np.log(np.exp(0.0) + np.exp(-1.0) + np.exp(3.0)) - 3.0
    assert loss.item() == pytest.approx((first + second) / 2)


def test_the_partition_function_is_unbiased() -> None:
    num_items, own = 40, torch.tensor([[0, 1, 2]])
    scores = torch.randn(num_items, generator=torch.Generator().manual_seed(4))
    sampler = NegativeSampler(np.arange(1, num_items + 1), power=0.75, num_negatives=16, seed=0)
    estimates = []
    for _ in range(4000):
        negatives, log_expected = sampler.draw()
        keep = ~accidental_hits(own, negatives, num_items)[0]
        drawn = (scores[negatives] - log_expected)[keep]
        estimates.append((torch.cat([scores[own[0]], drawn])).exp().sum().item())
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert np.mean(estimates) == pytest.approx(scores.exp().sum().item(), abs=4 * error)


def test_negatives_follow_frequency_to_the_power() -> None:
    events = np.array([1, 16, 81])
    sampler = NegativeSampler(events, power=0.5, num_negatives=30_000, seed=0)
    items, log_expected = sampler.draw()
    expected = 30_000 * np.array([1, 4, 9]) / 14
    assert torch.bincount(items).numpy() == pytest.approx(expected, rel=0.05)
    assert log_expected[items == 1][0].exp().item() == pytest.approx(expected[1], rel=1e-4)


def test_accidental_hits_by_hand() -> None:
    own = torch.tensor([[0, 4, 5], [2, 5, 5]])  # 5 pads a catalogue of five
    assert accidental_hits(own, torch.tensor([4, 2, 4]), 5).tolist() == [[True, False, True], [False, True, False]]
