"""Softmax over the catalogue, exact over a context's own candidates and sampled over the rest.

For one example with scores s, its partition function is estimated by

    Z = Σ_{i own} exp(s_i) + Σ_{j drawn, not own} exp(s_j) / (m q_j)

where m negatives are drawn by probabilities q, q_j ∝ frequency_j^power (log-Q correction, Yi et al. 2019). The own
candidates are the user's history and the targets: the items most similar to the targets, which a sample by frequency
rarely holds. The loss is the mean of -(s_t - log Z) over the example's targets t.
"""

import math

import numpy as np
import torch
from torch import Tensor

from components.baseline.data import Ints


class NegativeSampler:
    """Draws items by training frequency to a power, with replacement."""

    def __init__(self, train_events: Ints, power: float, num_negatives: int, seed: int) -> None:
        weights = np.maximum(train_events, 1).astype(np.float64) ** power
        self.probabilities = torch.from_numpy((weights / weights.sum()).astype(np.float32))
        self.log_expected = torch.log(self.probabilities) + math.log(num_negatives)
        self.num_negatives = num_negatives
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Items [m], and the log of how often each was expected in the draw, log(m q) [m]."""
        items = torch.multinomial(self.probabilities, self.num_negatives, replacement=True, generator=self.generator)
        return items, self.log_expected[items]


def accidental_hits(own: Tensor, negatives: Tensor, num_items: int) -> Tensor:
    """Which negatives [m] are own candidates of a context, bool [B, m]; `own` [B, O] is padded with num_items."""
    member = torch.zeros(len(own), num_items + 1, dtype=torch.bool)
    member.scatter_(1, own, True)
    return member[:, negatives]


def sampled_softmax_loss(own_scores: Tensor, negative_scores: Tensor, log_expected: Tensor, targets: Tensor) -> Tensor:
    """Mean loss over examples.

    Args:
        own_scores: Scores of the own candidates, [E, O]; -inf where there is none.
        negative_scores: Scores of the drawn negatives, [E, m]; -inf where one is an own candidate.
        log_expected: log(m q) of each negative, [m].
        targets: Weights of the own candidates that are targets, [E, O]; each row sums to one.
    """
    log_partition = torch.cat([own_scores, negative_scores - log_expected], dim=1).logsumexp(dim=1)
    target_scores = torch.where(targets > 0, own_scores, 0.0)
    return (log_partition - (targets * target_scores).sum(dim=1)).mean()
