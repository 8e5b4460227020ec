"""Paired bootstrap over users: how sure a difference between two models is.

Users are drawn with replacement, U of U, and a user brings all examples of all tasks, so that neither the examples of
one user nor the tasks are treated as independent. With w_u how often user u was drawn, S_u(m) the sum of the recalls
of model m over the user's examples of a task, and n_u their number,

    recall*(m) = Σ_u w_u S_u(m) / Σ_u w_u n_u        lift* = recall*(model) / recall*(baseline) - 1

and both models see the same draw. Intervals are percentiles of lift*. A p-value is the share of draws on the other
side of the null, (1 + count) / (1 + draws), doubled where the test is two-sided.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd
from statsmodels.stats.multitest import multipletests

from components.evaluation.metrics import Floats, Ints, recall

DRAWS_PER_BLOCK = 200  # bounds memory: a block's weights are [draws, users]


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline, per task."""

    tasks: tuple[str, ...]  # names of the T tasks
    examples: Ints  # examples of each task, [T]
    baseline: Floats  # mean recall of the baseline, [T]
    model: Floats  # mean recall of the model, [T]
    baseline_draws: Floats  # mean recall of the baseline in each draw, [draws, T]; NaN where a draw has no example
    model_draws: Floats  # the same of the model
    names: tuple[str, str] = ("urm", "target_attention")  # the model and the baseline

    @property
    def mean_difference(self) -> float:
        """Mean over tasks of the model's recall minus that of the baseline."""
        return float((self.model - self.baseline).mean())

    def difference_interval(self, confidence: float) -> tuple[float, float]:
        """Percentile interval of `mean_difference`."""
        draws = (self.model_draws - self.baseline_draws).mean(axis=1, keepdims=True)
        low, high = _percentiles(draws, confidence)
        return float(low[0]), float(high[0])

    @property
    def lift(self) -> Floats:
        """Relative lift of each task, [T]; NaN where the baseline finds nothing."""
        return relative_lift(self.model, self.baseline)

    @property
    def mean_lift(self) -> float:
        """Mean of the tasks' lifts; NaN where no task has one."""
        return _mean(self.lift)

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """Percentile interval of each task's lift, ([T], [T]), over the draws in which the baseline finds something."""
        return _percentiles(relative_lift(self.model_draws, self.baseline_draws), confidence)

    def mean_interval(self, confidence: float) -> tuple[float, float]:
        """Percentile interval of the mean of the tasks' lifts; NaN where no task has one."""
        draws = relative_lift(self.model_draws, self.baseline_draws)
        defined = np.isfinite(self.lift)
        if not defined.any():
            return float("nan"), float("nan")
        low, high = _percentiles(draws[:, defined].mean(axis=1, keepdims=True), confidence)
        return float(low[0]), float(high[0])

    def p_different(self) -> Floats:
        """Two-sided p-value of each task's difference, Holm-corrected over the tasks, [T]."""
        difference = self.model_draws - self.baseline_draws
        # Negated, so that a draw without an example counts for the null.
        one_sided = np.minimum(_share(~(difference > 0)), _share(~(difference < 0)))
        return holm(np.minimum(1, 2 * one_sided))

    def p_worse(self, margin: float) -> Floats:
        """P-value of "worse than the baseline by more than `margin`" (relative), Holm-corrected over the tasks, [T]."""
        return holm(_share(~(self.model_draws < (1 - margin) * self.baseline_draws)))


def compare(hits: pd.DataFrame, model: str, baseline: str, *, k: int, draws: int, seed: int) -> Comparison:
    """Bootstrap two models over the users of their common examples, from rows in the schema HITS, at the cut-off k."""
    rows = hits[(hits["k"] == k) & hits["model"].isin([model, baseline])]
    rows = rows.assign(recall=recall(rows["hits"], rows["targets"], rows["k"]))
    recalls = rows.pivot(index=["example_id", "user_id", "task"], columns="model", values="recall").reset_index()
    users, user_ids = pd.factorize(recalls["user_id"])
    tasks, names = pd.factorize(recalls["task"])
    shape = (len(user_ids), len(names))
    counts = sum_by_user(shape, users, tasks, np.ones(len(recalls)))
    baseline_sums = sum_by_user(shape, users, tasks, recalls[baseline].to_numpy())
    model_sums = sum_by_user(shape, users, tasks, recalls[model].to_numpy())
    totals = counts.sum(axis=0)
    baseline_draws, model_draws = _draw(counts, baseline_sums, model_sums, draws, seed)
    return Comparison(
        tasks=tuple(names),
        examples=totals.astype(np.int64),
        baseline=baseline_sums.sum(axis=0) / totals,
        model=model_sums.sum(axis=0) / totals,
        baseline_draws=baseline_draws,
        model_draws=model_draws,
        names=(model, baseline),
    )


def relative_lift(model: Floats, baseline: Floats) -> Floats:
    """Relative lift, model / baseline - 1; NaN where the baseline is zero."""
    return np.divide(model, baseline, out=np.full_like(model, np.nan), where=baseline > 0) - 1


def holm(p_values: Floats) -> Floats:
    """Holm-corrected p-values (family-wise error)."""
    corrected: Floats = multipletests(p_values, method="holm")[1]
    return corrected


def _draw(counts: Floats, baseline_sums: Floats, model_sums: Floats, draws: int, seed: int) -> tuple[Floats, Floats]:
    random = np.random.default_rng(seed)
    num_users = len(counts)
    blocks: list[tuple[Floats, Floats]] = []
    for start in range(0, draws, DRAWS_PER_BLOCK):
        size = min(DRAWS_PER_BLOCK, draws - start)
        weights = random.multinomial(num_users, np.full(num_users, 1 / num_users), size=size).astype(np.float64)
        examples = weights @ counts
        examples[examples == 0] = np.nan
        blocks.append((weights @ baseline_sums / examples, weights @ model_sums / examples))
    return np.concatenate([block[0] for block in blocks]), np.concatenate([block[1] for block in blocks])


def sum_by_user(shape: tuple[int, int], users: Ints, tasks: Ints, values: Floats) -> Floats:
    """Sums of values by user and task, [users, tasks], from the numbers of both."""
    table = np.zeros(shape)
    np.add.at(table, (users, tasks), values)
    return table


def _percentiles(draws: Floats, confidence: float) -> tuple[Floats, Floats]:
    tail = (1 - confidence) / 2
    bounds = [np.full(draws.shape[1], np.nan), np.full(draws.shape[1], np.nan)]
    for column in range(draws.shape[1]):
        finite = draws[np.isfinite(draws[:, column]), column]
        if len(finite):
            for bound, quantile in zip(bounds, (tail, 1 - tail), strict=True):
                bound[column] = np.quantile(finite, quantile)
    return bounds[0], bounds[1]


def _share(condition: npt.NDArray[np.bool_]) -> Floats:
    shares: Floats = (1 + condition.sum(axis=0)) / (1 + len(condition))
    return shares


def _mean(values: Floats) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if len(finite) else float("nan")
