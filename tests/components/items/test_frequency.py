"""Negatives come as often as their counts say, and what nobody had never comes."""

import numpy as np
import pytest

from components.items.frequency import FrequencySampler


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_items_are_drawn_by_their_count_to_a_power_and_never_without_one(power: float) -> None:
    counts = np.array([0, 1, 4, 0, 16, 0])
    sampler = FrequencySampler(counts, 100_000, power)
    places, log_expected = sampler.draw(np.random.default_rng(0))
    expected = np.where(counts > 0, counts.astype(float) ** power, 0)
    expected *= 100_000 / expected.sum()
    drawn = np.bincount(places, minlength=6)
    assert drawn[counts == 0].tolist() == [0, 0, 0]
    np.testing.assert_allclose(drawn, expected, rtol=0.05)
    np.testing.assert_allclose(np.exp(log_expected), expected[places], rtol=1e-4)
