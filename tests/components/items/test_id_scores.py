import numpy as np
import pytest
import torch

from components.items import id_scores
from components.items.id_scores import AGE_DECAY, history_weights, score_items


def test_newer_items_weigh_more_and_places_without_an_item_nothing():
    known = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    weights = history_weights(known)
    powers = np.arange(1, 4) ** -AGE_DECAY
    np.testing.assert_allclose(weights[0], powers / powers.sum(), rtol=1e-6)
    np.testing.assert_allclose(weights[1], [*powers[:2] / powers[:2].sum(), 0], rtol=1e-6)
    assert not weights[2].any()


@pytest.mark.parametrize("at_once", [2, 64])
def test_items_of_each_user_are_scored_in_their_order(at_once, monkeypatch):
    monkeypatch.setattr(id_scores, "_EXAMPLES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    users, candidates = torch.randn(5, 3, generator=generator), torch.randn(9, 3, generator=generator)
    rows = torch.randint(9, (5, 4), generator=generator)
    scores = score_items(users, candidates, rows)
    torch.testing.assert_close(scores, (users @ candidates.T).gather(1, rows))
