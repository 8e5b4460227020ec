"""Paired bootstrap over users: how sure a difference between two models is.

Users are drawn with replacement, U of U, and a user brings all examples of all tasks, so that neither the examples of
one user nor the tasks are treated as independent. With w_u how often user u was drawn, S_u(m) the sum of the recalls
of model m over the user's examples of a task, and n_u their number,

    recall*(m) = Σ_u w_u S_u(m) / Σ_u w_u n_u

and both models see the same draw. Two figures sum up T tasks:

    ratio of means = Σ_t recall*_t(model) / Σ_t recall*_t(baseline) - 1
    mean of lifts  = 1/T Σ_t (recall*_t(model) / recall*_t(baseline) - 1)

The first one weighs a task by what is found in it, so that no task in which the baseline finds little decides alone.
Intervals are percentiles of the draws. A p-value is the share of draws on the other side of the null,
(1 + count) / (1 + draws), doubled where the test is two-sided.

**Few users.** Where n users all agree, every draw agrees with them, however small n is. So no p-value is below that of
the sign test, 0.5ⁿ (doubled where two-sided), and there is no interval of fewer than six, whom chance lets agree
more often than once in twenty times; nor of a mean over tasks of which one has fewer, since these few would decide it.

**Held-out categories.** A task with held-out queries claims something of categories that no training named, and has few
of them. There categories are drawn as well, C of C and independently of the users, and an example of user u and
category c counts w_u · v_c times: the pigeonhole bootstrap for crossed random effects (Owen 2007, Annals of Applied
Statistics 1(2), doi 10.1214/07-AOAS122). No bootstrap of crossed effects is exact; this one is mildly conservative
(Owen and Eckles 2012, Annals of Applied Statistics 6(3), doi 10.1214/12-AOAS547).

**Several trainings.** Draws of users say what the models that were trained are worth, not what the next training would
give. Where the examples are those of n trainings with ratios of means r_1 … r_n, the variance s² of these joins the
variance σ² of the draws:

    ratio ± t_ν · √(σ² + s²/n),    ν = (n - 1) (1 + nσ²/s²)²

with the quantile of Student's t at the degrees of freedom of Satterthwaite (1946, Biometrics Bulletin 2(6), doi
10.2307/3002019). It errs on the wide side, since some of s² is chance among users already.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import bootstrap, t
from statsmodels.stats.multitest import multipletests

from components.evaluation.metrics import Floats, Ints, Mask, recall

DRAWS_PER_BLOCK = 200  # bounds memory: a block's weights are [draws, users]
MIN_UNITS = 6  # of an interval: five agree by chance with a probability of 2 · 0.5⁵ = .06


@dataclass(frozen=True)
class Comparison:
    """A model against a baseline, per task."""

    tasks: tuple[str, ...]  # names of the T tasks
    examples: Ints  # examples of each task, [T]
    baseline: Floats  # mean recall of the baseline, [T]
    model: Floats  # mean recall of the model, [T]
    baseline_draws: Floats  # mean recall of the baseline in each draw, [draws, T]; NaN where a draw has no example
    model_draws: Floats  # the same of the model
    categories: Ints  # held-out categories drawn beside the users, [T]; 0: users alone are drawn
    users: Ints  # users of each task, [T]
    names: tuple[str, str] = ("urm", "target_attention")  # the model and the baseline

    def restrict(self, tasks: Iterable[str]) -> "Comparison":
        """The same comparison on some of its tasks, in their order here; the draws stay the same."""
        wanted = set(tasks)
        places = [place for place, task in enumerate(self.tasks) if task in wanted]
        return replace(
            self,
            tasks=tuple(self.tasks[place] for place in places),
            examples=self.examples[places],
            baseline=self.baseline[places],
            model=self.model[places],
            baseline_draws=self.baseline_draws[:, places],
            model_draws=self.model_draws[:, places],
            categories=self.categories[places],
            users=self.users[places],
        )

    @property
    def units(self) -> Ints:
        """How many are drawn in each task, [T]: users, or categories where these are drawn and are fewer."""
        return np.where(self.categories > 0, np.minimum(self.categories, self.users), self.users)

    @property
    def few_users(self) -> bool:
        """Whether one of these tasks has too few for an interval over all of them."""
        return bool((self.units < MIN_UNITS).any())

    @property
    def ratio(self) -> float:
        """Relative lift of the mean recall over the tasks (ratio of means); NaN where the baseline finds nothing."""
        return float(relative_lift(self.model.mean(keepdims=True), self.baseline.mean(keepdims=True))[0])

    def ratio_interval(self, confidence: float) -> tuple[float, float]:
        """Percentile interval of `ratio`, over the draws in which the baseline finds something; NaN of few users."""
        means = [draws.mean(axis=1, keepdims=True) for draws in (self.model_draws, self.baseline_draws)]
        return self._interval_of_mean(relative_lift(means[0], means[1]), confidence)

    def training_interval(self, ratios: Sequence[float], confidence: float) -> tuple[float, float]:
        """Interval of `ratio` that knows of chance from training to training.

        NaN of few users, of one training, and where the baseline of a training finds nothing.

        Args:
            ratios: That of each training, whose examples are pooled here.
            confidence: Of the interval.
        """
        error, quantile = self.training_spread(ratios, confidence)
        return self.ratio - quantile * error, self.ratio + quantile * error

    def training_spread(self, ratios: Sequence[float], confidence: float) -> tuple[float, float]:
        """Standard error of `training_interval`, and Student's quantile; NaN where there is no interval."""
        number = len(ratios)
        if number < 2 or self.few_users or not np.isfinite(ratios).all():
            return float("nan"), float("nan")
        draws = relative_lift(self.model_draws.mean(axis=1), self.baseline_draws.mean(axis=1))
        of_users = float(np.var(draws[np.isfinite(draws)], ddof=1))
        of_trainings = float(np.var(ratios, ddof=1)) / number
        freedom = (number - 1) * (1 + of_users / of_trainings) ** 2 if of_trainings else np.inf
        return (of_users + of_trainings) ** 0.5, float(t.ppf((1 + confidence) / 2, freedom))

    def won(self, confidence: float) -> Mask:
        """Tasks in which the model is ahead beyond chance, Holm-corrected over these tasks, [T]."""
        return (self.model > self.baseline) & (self.p_different() < 1 - confidence)

    @property
    def mean_difference(self) -> float:
        """Mean over tasks of the model's recall minus that of the baseline."""
        return float((self.model - self.baseline).mean())

    def difference_interval(self, confidence: float) -> tuple[float, float]:
        """Percentile interval of `mean_difference`; NaN of few users."""
        draws = (self.model_draws - self.baseline_draws).mean(axis=1, keepdims=True)
        return self._interval_of_mean(draws, confidence)

    @property
    def lift(self) -> Floats:
        """Relative lift of each task, [T]; NaN where the baseline finds nothing."""
        return relative_lift(self.model, self.baseline)

    @property
    def mean_lift(self) -> float:
        """Mean of the tasks' lifts; NaN where no task has one."""
        return _mean(self.lift)

    def interval(self, confidence: float) -> tuple[Floats, Floats]:
        """Percentile interval of each task's lift, ([T], [T]), over the draws in which the baseline finds something.

        NaN of few users.
        """
        bounds = _percentiles(relative_lift(self.model_draws, self.baseline_draws), confidence)
        low, high = (np.where(self.units >= MIN_UNITS, bound, np.nan) for bound in bounds)
        return low, high

    def mean_interval(self, confidence: float) -> tuple[float, float]:
        """Percentile interval of the mean of the tasks' lifts; NaN where no task has one, and of few users."""
        draws = relative_lift(self.model_draws, self.baseline_draws)
        defined = np.isfinite(self.lift)
        if not defined.any():
            return float("nan"), float("nan")
        return self._interval_of_mean(draws[:, defined].mean(axis=1, keepdims=True), confidence)

    def p_different(self) -> Floats:
        """Two-sided p-value of each task's difference, Holm-corrected over the tasks, [T]."""
        difference = self.model_draws - self.baseline_draws
        # Negated, so that a draw without an example counts for the null.
        one_sided = np.minimum(_share(~(difference > 0)), _share(~(difference < 0)))
        return holm(np.minimum(1, 2 * np.maximum(one_sided, 0.5**self.units)))

    def p_worse(self, margin: float) -> Floats:
        """P-value of "worse than the baseline by more than `margin`" (relative), Holm-corrected over the tasks, [T]."""
        share = _share(~(self.model_draws < (1 - margin) * self.baseline_draws))
        return holm(np.maximum(share, 0.5**self.units))

    def _interval_of_mean(self, draws: Floats, confidence: float) -> tuple[float, float]:
        """Percentile interval of a figure over all tasks, from its draws [draws, 1]."""
        if self.few_users:
            return float("nan"), float("nan")
        low, high = _percentiles(draws, confidence)
        return float(low[0]), float(high[0])


def compare(hits: pd.DataFrame, model: str, baseline: str, *, k: int, draws: int, seed: int) -> Comparison:
    """Bootstrap two models over the users of their common examples, from rows in the schema HITS, at the cut-off k.

    Categories are drawn, too, in a task of which every row has a `held_out_query`.
    """
    rows = hits[(hits["k"] == k) & hits["model"].isin([model, baseline])]
    rows = rows.assign(recall=recall(rows["hits"], rows["targets"], rows["k"]))
    mine = rows[rows["model"] == model].sort_values("example_id")
    theirs = rows[rows["model"] == baseline].set_index("example_id")["recall"].loc[mine["example_id"]]
    users = pd.factorize(mine["user_id"])[0]
    tasks, names = pd.factorize(mine["task"])
    categories = pd.factorize(mine["held_out_query"])[0]
    found = np.stack([np.ones(len(mine)), theirs.to_numpy(), mine["recall"].to_numpy()])
    totals = np.stack([np.bincount(tasks, values, minlength=len(names)) for values in found])
    baseline_draws, model_draws, drawn = _draw(users, tasks, categories, found, draws, seed)
    return Comparison(
        tasks=tuple(names),
        examples=totals[0].astype(np.int64),
        baseline=totals[1] / totals[0],
        model=totals[2] / totals[0],
        baseline_draws=baseline_draws,
        model_draws=model_draws,
        categories=drawn,
        users=np.count_nonzero(sum_by_user((1 + users.max(), len(names)), users, tasks, found[0]), axis=0),
        names=(model, baseline),
    )


def mean_interval(values: Floats, seed: int, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of independent values."""
    if len(values) < 2 or np.ptp(values) == 0:  # the bootstrap needs variance
        return float(values.mean()), float(values.mean())
    random = np.random.default_rng(seed)
    found = bootstrap((values,), np.mean, confidence_level=confidence, method="percentile", rng=random)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def relative_lift(model: Floats, baseline: Floats) -> Floats:
    """Relative lift, model / baseline - 1; NaN where the baseline is zero."""
    return np.divide(model, baseline, out=np.full_like(model, np.nan), where=baseline > 0) - 1


def holm(p_values: Floats) -> Floats:
    """Holm-corrected p-values (family-wise error)."""
    corrected: Floats = multipletests(p_values, method="holm")[1]
    return corrected


def _draw(
    users: Ints, tasks: Ints, categories: Ints, found: Floats, draws: int, seed: int
) -> tuple[Floats, Floats, Ints]:
    """Mean recalls of baseline and model per draw and task, and how many categories each task's draws choose from.

    Args:
        users: User of each example, 0 … U - 1 [E].
        tasks: Task of each example, 0 … T - 1 [E].
        categories: Held-out category of each example, -1 without one [E].
        found: Ones, the recalls of the baseline and those of the model, [3, E].
        draws: Number of draws.
        seed: Of the draws.
    """
    num_users, num_tasks, num_categories = 1 + users.max(), 1 + tasks.max(), 1 + categories.max()
    sums = [sum_by_user((num_users, num_tasks), users, tasks, values) for values in found]
    crossed = [
        rows for rows in (np.flatnonzero(tasks == task) for task in range(num_tasks)) if (categories[rows] >= 0).all()
    ]
    drawn = np.zeros(num_tasks, dtype=np.int64)
    for rows in crossed:
        drawn[tasks[rows[0]]] = len(np.unique(categories[rows]))
    of_categories = draw_weights(num_categories, draws, (seed, 1))
    blocks: list[Floats] = []
    for weights in draw_weights(num_users, draws, seed):
        block = np.stack([weights @ table for table in sums])  # [3, draws, T]
        if crossed:
            category_weights = next(of_categories)
            for rows in crossed:
                times = weights[:, users[rows]] * category_weights[:, categories[rows]]
                block[:, :, tasks[rows[0]]] = found[:, rows] @ times.T
        block[0][block[0] == 0] = np.nan
        blocks.append(block[1:] / block[0])
    baseline_draws, model_draws = np.concatenate(blocks, axis=1)
    return baseline_draws, model_draws, drawn


def draw_weights(number: int, draws: int, seed: int | tuple[int, int]) -> Iterator[Floats]:
    """How often each of so many is drawn with replacement, as many as there are; blocks [≤ DRAWS_PER_BLOCK, number]."""
    counts = _draw_counts(number, draws, seed)
    for start in range(0, draws, DRAWS_PER_BLOCK):
        yield counts[start : start + DRAWS_PER_BLOCK].astype(np.float64)


@lru_cache(maxsize=32)  # comparisons of the same users share their draws
def _draw_counts(number: int, draws: int, seed: int | tuple[int, int]) -> npt.NDArray[np.uint8]:
    random, chances = np.random.default_rng(seed), np.full(number, 1 / number)
    counts = np.empty((draws, number), np.uint8)  # of so many equal chances none comes up 256 times
    for start in range(0, draws, DRAWS_PER_BLOCK):
        block = counts[start : start + DRAWS_PER_BLOCK]
        block[:] = random.multinomial(number, chances, size=len(block))
    return counts


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
