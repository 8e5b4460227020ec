"""How far a trained model should follow popularity, measured on examples that it was not trained on.

Training asks for purchases with tables that know only what was before them (ADR 19); at work the tables hold more, and
another part of the catalogue is asked for. So each prompt gets a function of how often an item was bought, added to its
scores, as a model that has weights of popularity can take it up (ADR 38):

    E examples · K items with the highest scores s · R = 12 ramps f of log(1 + baskets), see ramps.py
    T_e those of the K items that example e asks for

    w = argmin  Σ_e [ log Σᵢ exp(s_ei + f_i·w)  -  mean over T_e of (s_ei + f_i·w) ] / E  +  λ |w|²

A prompt keeps what it has unless the examples that did not choose w gain by it: w of one half of the contexts is judged
by the other half, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from components.items.ramps import DOUBLINGS, ramp_features

DEPTH = 500  # K: items of each example that are ranked anew
PRIOR = 0.01  # λ
_ITERATIONS = 40
_NO_ITEM = -1e9  # score where there is no item

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shortlists:
    """The best items of the examples of one prompt by a model, K of each."""

    contexts: Ints  # number of each example's user context [E]
    scores: Floats  # [E, K]; -inf where there is no item
    log_counts: Floats  # log(1 + baskets) of the items [E, K]
    wanted: Flags  # whether the example asks for the item [E, K]
    num_targets: Ints  # how many items it asks for, in the shortlist or not [E]

    @cached_property
    def features(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of the distinct counts [n, R], and which of them each item has [E, K]."""
        distinct, where = np.unique(self.log_counts, return_inverse=True)
        features = ramp_features(torch.from_numpy(distinct).float()[:, None], 1)
        return features, torch.from_numpy(where.reshape(self.log_counts.shape))


@dataclass(frozen=True)
class Calibration:
    """What the examples of one prompt get.

    Attributes:
        slopes: w, one per doubling of a count [R]; zero where nothing is taken.
        taken: Whether the halves gain by the w of each other.
        recalls: Recall@k of each example as it was [E].
        calibrated: Recall@k of each example by the w of the other half [E].
    """

    slopes: torch.Tensor
    taken: bool
    recalls: npt.NDArray[np.float64]
    calibrated: npt.NDArray[np.float64]

    def part(self, rows: Flags) -> Calibration:
        """The same of some examples [E]: those of one task, where tasks share a prompt."""
        return replace(self, recalls=self.recalls[rows], calibrated=self.calibrated[rows])

    @property
    def before(self) -> float:
        """Mean recall as it was."""
        return float(self.recalls.mean())

    @property
    def after(self) -> float:
        """Mean recall by the w of the other half."""
        return float(self.calibrated.mean())

    @property
    def recall(self) -> float:
        """Mean recall from now on, on examples that did not choose w."""
        return self.after if self.taken else self.before


def calibrate(lists: Shortlists, k: int) -> Calibration:
    """Fit w to examples, at least one, and judge it."""
    nothing, everyone = torch.zeros(DOUBLINGS), np.ones(len(lists.contexts), dtype=bool)
    second_half = np.unique(lists.contexts, return_inverse=True)[1] % 2 == 1
    before, after = _recall(lists, nothing, k), np.empty(len(lists.contexts))
    for judged in (second_half, ~second_half):
        after[judged] = _recall(lists, fit_slopes(lists, ~judged), k)[judged]
    taken = bool(after.mean() > before.mean())
    return Calibration(fit_slopes(lists, everyone) if taken else nothing, taken, before, after)


def fit_slopes(lists: Shortlists, rows: Flags) -> torch.Tensor:
    """The w [R] of some examples [E]; zero where none of their shortlists has a target."""
    slopes = torch.zeros(DOUBLINGS, requires_grad=True)
    rows = rows & lists.wanted.any(axis=1)
    if not rows.any():
        return slopes.detach()
    scores, wanted = _scores(lists)[rows], torch.from_numpy(lists.wanted[rows])
    features, where = lists.features
    where, hits = where[rows], wanted.sum(dim=1)
    optimizer = torch.optim.LBFGS([slopes], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def evaluate() -> float:
        optimizer.zero_grad()
        shifted = scores + (features @ slopes)[where]
        likelihood = (shifted * wanted).sum(dim=1) / hits - shifted.logsumexp(dim=1)
        loss = -likelihood.mean() + PRIOR * slopes.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return float(loss.detach())

    optimizer.step(evaluate)  # type: ignore[no-untyped-call]  # as above
    return slopes.detach()


def spread_slopes(
    slopes: Mapping[int, torch.Tensor], num_rows: int, num_counts: int, per_doubling: int
) -> torch.Tensor:
    """Slopes by row as weights of all ramps of a model, zero for its other counts and rows.

    Args:
        slopes: Row → w [R].
        num_rows: T, rows in all.
        num_counts: G, counts that the model reads; `slopes` are of the first.
        per_doubling: Ramps of the model for each doubling.

    Returns:
        Float32 [T, G · 12 · ramps]; the function of the first count is the same, in finer steps.
    """
    weights = torch.zeros(num_rows, num_counts, DOUBLINGS * per_doubling)
    for row, of_row in slopes.items():
        weights[row, 0] = of_row.repeat_interleave(per_doubling) / per_doubling
    return weights.flatten(1)


def _recall(lists: Shortlists, slopes: torch.Tensor, k: int) -> npt.NDArray[np.float64]:
    """Recall@k of each example with these slopes [E]."""
    features, where = lists.features
    shifted = _scores(lists) + (features @ slopes)[where]
    best = shifted.topk(min(k, shifted.shape[1]), dim=1).indices
    hits = torch.from_numpy(lists.wanted).gather(1, best).sum(dim=1).numpy()
    recall: npt.NDArray[np.float64] = hits / np.minimum(lists.num_targets, k)
    return recall


def _scores(lists: Shortlists) -> torch.Tensor:
    return torch.from_numpy(lists.scores).float().clamp(min=_NO_ITEM)
