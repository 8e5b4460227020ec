"""What the gate can prove: the power of its rule on the lift, by the standard error of the bootstrap.

With s the standard deviation of the draws of log(model / baseline), m the lift that the policy asks for and z the
normal quantile of the interval's confidence, a model whose lift is L has a lower bound of at least m with probability

    power(L) = Φ(log((1 + L) / (1 + m)) / s - z)

so that four of five cases prove L = (1 + m) · exp(s (z + Φ⁻¹(0.8))) - 1. Where n trainings decide, their spread joins
s², and Student's t at the degrees of freedom of `Comparison.training_spread` takes the place of z (an approximation:
it takes the spread for known). The other rules of the policy can only lower the power.
"""

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm

from components.evaluation.bootstrap import Comparison, relative_lift

POWER = 0.8  # four of five cases


def power(lift: float, error: float, quantile: float, min_lift: float) -> float:
    """Probability that a model with this lift is proven to reach `min_lift`."""
    return float(norm.cdf(np.log((1 + lift) / (1 + min_lift)) / error - quantile))


def smallest_proven(error: float, quantile: float, min_lift: float) -> float:
    """The lift that is proven to reach `min_lift` in four of five cases."""
    return float((1 + min_lift) * np.exp(error * (quantile + norm.ppf(POWER))) - 1)


def log_error(comparison: Comparison) -> float:
    """Standard error of the log of model / baseline, means over the tasks; NaN of few users."""
    if comparison.few_users:
        return float("nan")
    ratios = 1 + relative_lift(comparison.model_draws.mean(axis=1), comparison.baseline_draws.mean(axis=1))
    sound = ratios[np.isfinite(ratios) & (ratios > 0)]
    return float(np.log(sound).std(ddof=1)) if len(sound) > 1 else float("nan")


def errors_of(
    comparison: Comparison, confidence: float, trainings: Sequence[float] | None = None
) -> tuple[float, float]:
    """Standard error and quantile of the rule: of one training's users, or of these trainings' lifts as well."""
    if trainings is None:
        return log_error(comparison), float(norm.ppf((1 + confidence) / 2))
    error, quantile = comparison.training_spread(trainings, confidence)
    return error / (1 + float(np.mean(trainings))), quantile


def describe_power(error: float, quantile: float, min_lift: float) -> str:
    """One sentence: the lift that is proven in four of five cases."""
    lift = smallest_proven(error, quantile, min_lift)
    if not np.isfinite(lift):
        return "What lift would be proven is unknown, since there is no interval."
    reach = f" to reach {min_lift:+.1%}" if min_lift else ""
    return f"A lift of {lift:.1%} would be proven{reach} in four of five cases."
