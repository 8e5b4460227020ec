"""The policy of the gate: whether the model may be released, and why, in words."""

from typing import Any

import numpy as np

from components.config import EvaluationConfig, GatePolicy
from components.evaluation.bootstrap import Comparison


def judge(comparison: Comparison, config: EvaluationConfig) -> dict[str, Any]:
    """Hold a comparison against the policy: passed, the verdict for people, a reason for each rule that is not met."""
    policy = config.gate
    reasons = [
        reason
        for reason in (
            _mean_lift_reason(comparison, policy),
            _tasks_won_reason(comparison, policy),
            _worse_tasks_reason(comparison, policy),
        )
        if reason
    ]
    passed = not reasons
    decision = (
        "The model may be released."
        if passed
        else f"The model should not be released, since it breaks {len(reasons)} of the 3 rules of the policy."
    )
    return {"passed": passed, "verdict": f"{decision} {_describe(comparison, config)}", "reasons": reasons}


def _mean_lift_reason(comparison: Comparison, policy: GatePolicy) -> str | None:
    if comparison.mean_lift >= policy.min_mean_lift:
        return None
    return (
        f"Mean lift over the tasks is {comparison.mean_lift:+.1%}, below the required {policy.min_mean_lift:+.1%}."
        if np.isfinite(comparison.mean_lift)
        else "No task has a lift, since target attention finds nothing in any of them."
    )


def _tasks_won_reason(comparison: Comparison, policy: GatePolicy) -> str | None:
    won, total = _won(comparison), len(comparison.tasks)
    if won >= policy.min_tasks_won:
        return None
    return f"URM leads in {won} of {total} tasks, below the required {policy.min_tasks_won}."


def _worse_tasks_reason(comparison: Comparison, policy: GatePolicy) -> str | None:
    p_values = comparison.p_worse(policy.max_task_loss)
    worse = [
        f"{task} ({lift:+.1%})"
        for task, lift, p_value in zip(comparison.tasks, comparison.lift, p_values, strict=True)
        if p_value < 1 - policy.confidence
    ]
    if not worse:
        return None
    return (
        f"Proven more than {policy.max_task_loss:.0%} worse than target attention at {policy.confidence:.0%} "
        f"confidence, Holm-corrected: {', '.join(worse)}."
    )


def _describe(comparison: Comparison, config: EvaluationConfig) -> str:
    cases, lift = f"{int(comparison.examples.sum()):,} held-out cases", comparison.mean_lift
    if not np.isfinite(lift):
        return f"On {cases}, target attention recalls nothing, so that no lift in Recall@{config.k} is defined."
    low, high = comparison.mean_interval(config.gate.confidence)
    order = [place for place in np.argsort(comparison.lift) if np.isfinite(comparison.lift[place])]
    best, worst = order[-1], order[0]
    undefined = len(comparison.tasks) - len(order)
    return (
        f"On {cases}, the {config.k} items it recalls hold {abs(lift):.1%} {'more' if lift >= 0 else 'less'} of what "
        f"users then chose than those of the target-attention model, on average over {len(order)} tasks "
        f"({config.gate.confidence:.0%} interval {low:+.1%} to {high:+.1%}). It leads in "
        f"{_won(comparison)} of {len(comparison.tasks)}, "
        f"does best in {comparison.tasks[best]} ({comparison.lift[best]:+.1%}) and worst in {comparison.tasks[worst]} "
        f"({comparison.lift[worst]:+.1%})."
        + (f" In {undefined} more target attention recalls nothing, so that no lift is defined." if undefined else "")
    )


def _won(comparison: Comparison) -> int:
    return int((comparison.model > comparison.baseline).sum())
