"""How far a trained model should follow popularity and the ID vectors, measured on examples it was not trained on.

Training asks for purchases with tables that know only what was before them; at work the tables hold more, and
another part of the catalogue is asked for. So each prompt gets a function of how often an item was bought, added to its
scores, as a model that has weights of popularity can take it up; and then a multiple of what the ID vectors
alone say, from which training has led away (docs/model.md).

    E examples · K items with the highest scores s · R = 12 ramps f of log(1 + baskets), see ramps.py
    g scores by the ID vectors, see id_scores.py · T_e those of the K items that example e asks for

    w = argmin  Σ_e [ log Σᵢ exp(s_ei + f_i·w)  -  mean over T_e of (s_ei + f_i·w) ] / E  +  λ |w|²
    a = argmax  mean NDCG@k of  s + f·w + a·g,  of a few

A prompt keeps what it has unless the examples that did not choose gain: w and a of one half of the contexts are judged
by the other half, and the other way round; w by Recall@k, a by NDCG@k where Recall@k does not fall by more than its
standard error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from components.items.ramps import DOUBLINGS, ramp_features

DEPTH = 500  # K: items of each example that are ranked anew
PRIOR = 0.01  # λ
ID_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.6, 2.4, 3.6, 4.8)  # a
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
    id_scores: Floats | None = None  # of the items by the ID vectors alone [E, K]; none for a model that lacks them

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
        id_weight: a; zero where nothing is taken.
        recalls: Recall@k of each example as it was [E].
        calibrated: Recall@k of each example from now on [E], by the w and a of the other half.
    """

    slopes: torch.Tensor
    id_weight: float
    recalls: npt.NDArray[np.float64]
    calibrated: npt.NDArray[np.float64]

    def part(self, rows: Flags) -> Calibration:
        """The same of some examples [E]: those of one task, where tasks share a prompt."""
        return replace(self, recalls=self.recalls[rows], calibrated=self.calibrated[rows])

    @property
    def taken(self) -> bool:
        """Whether anything changes."""
        return self.id_weight > 0 or bool(self.slopes.any())

    @property
    def before(self) -> float:
        """Mean recall as it was."""
        return float(self.recalls.mean())

    @property
    def recall(self) -> float:
        """Mean recall from now on, on examples that did not choose w and a."""
        return float(self.calibrated.mean())


def name_by_task(calibrations: Mapping[str, Calibration]) -> dict[str, float]:
    """What each task got, as MLflow shows it: `calibrated_recall.TASK` and `id_weight.TASK`, a."""
    recalls = {f"calibrated_recall.{task}": one.recall for task, one in calibrations.items()}
    return recalls | {f"id_weight.{task}": one.id_weight for task, one in calibrations.items()}


class _Setting(NamedTuple):
    slopes: torch.Tensor  # w
    id_weight: float = 0.0  # a


class _Quality(NamedTuple):
    recalls: npt.NDArray[np.float64]  # Recall@k of each example
    ndcg: npt.NDArray[np.float64]  # NDCG@k


def calibrate(lists: Shortlists, k: int) -> Calibration:
    """Fit w and a to examples, at least one, and judge them."""
    second = np.unique(lists.contexts, return_inverse=True)[1] % 2 == 1
    parts = (np.ones(len(second), dtype=bool), ~second, second)  # whose settings are fitted: of all, and of each half

    def judge(settings: Sequence[_Setting]) -> _Quality:
        """Of each half by the setting of the other."""
        found = _Quality(np.empty(len(second)), np.empty(len(second)))
        for setting, rows in zip(settings[1:], (second, ~second), strict=True):
            found.recalls[rows], found.ndcg[rows] = _measure(lists, setting, rows, k)
        return found

    chosen = [_Setting(torch.zeros(DOUBLINGS)) for _ in parts]
    before = best = judge(chosen)
    fitted = [_Setting(fit_slopes(lists, rows)) for rows in parts]
    after = judge(fitted)
    if after.recalls.mean() > best.recalls.mean():
        chosen, best = fitted, after
    if lists.id_scores is not None:
        weighted = [
            one._replace(id_weight=_choose_weight(lists, one, rows, k)) for one, rows in zip(chosen, parts, strict=True)
        ]
        after = judge(weighted)
        change = after.recalls - best.recalls
        if after.ndcg.mean() > best.ndcg.mean() and change.mean() >= -change.std() / np.sqrt(len(change)):
            chosen, best = weighted, after
    return Calibration(*chosen[0], before.recalls, best.recalls)


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


def _choose_weight(lists: Shortlists, setting: _Setting, rows: Flags, k: int) -> float:
    """The a of some examples [E], the least of equals; zero where there are none."""
    if not rows.any():
        return 0.0
    ndcg = [_measure(lists, setting._replace(id_weight=weight), rows, k).ndcg.mean() for weight in ID_WEIGHTS]
    return ID_WEIGHTS[int(np.argmax(ndcg))]


def _measure(lists: Shortlists, setting: _Setting, rows: Flags, k: int) -> _Quality:
    """Quality of some examples [E] with a setting."""
    features, where = lists.features
    scores = _scores(lists)[rows] + (features @ setting.slopes)[where[rows]]
    if setting.id_weight and lists.id_scores is not None:
        scores += setting.id_weight * torch.from_numpy(lists.id_scores[rows])
    best = scores.topk(min(k, scores.shape[1]), dim=1).indices
    hits = torch.from_numpy(lists.wanted[rows]).gather(1, best).numpy()
    most = np.minimum(lists.num_targets[rows], k)
    gains = 1 / np.log2(np.arange(2, k + 2))
    return _Quality(hits.sum(axis=1) / most, hits @ gains[: hits.shape[1]] / gains.cumsum()[most - 1])


def _scores(lists: Shortlists) -> torch.Tensor:
    return torch.from_numpy(lists.scores).float().clamp(min=_NO_ITEM)
