"""The policy of the gate (ADR 27): whether the model may be released, and why, in words."""

from collections.abc import Collection
from typing import Any

import numpy as np

from components.config import GatePolicy, RunConfig
from components.evaluation.bootstrap import MIN_UNITS, Comparison
from components.evaluation.report import NO_INTERVAL, count, describe_interval, describe_lift, title
from components.evaluation.summary import name_kind, split_tasks

NUM_RULES = 5


def judge(
    comparison: Comparison, best: Comparison, config: RunConfig, cut_short: Collection[str] = ()
) -> dict[str, Any]:
    """Hold a comparison against the policy: passed, the verdict for people, a reason for each rule that is not met.

    Args:
        comparison: URM against target attention, all tasks.
        best: URM against the best other model in the mean over the headline's tasks, all tasks.
        config: Of the run: its tasks, cut-off and policy.
        cut_short: Models whose training its time limit ended.
    """
    policy = config.evaluation.gate
    names, _ = split_tasks(config, comparison.tasks)
    headline, against_best, kind = comparison.restrict(names), best.restrict(names), name_kind(config, names)
    reasons = [
        reason
        for reason in (
            _untested_reason(comparison, config) or _lift_reason(headline, policy, kind),
            _tasks_won_reason(headline, policy, kind),
            _worse_tasks_reason(comparison, policy),
            _best_reason(against_best, policy, kind),
            _cut_short_reason({comparison.names[1], best.names[1]} & {*cut_short}),
        )
        if reason
    ]
    passed = not reasons
    decision = (
        "The model may be released."
        if passed
        else f"The model should not be released, since it breaks {len(reasons)} of the {NUM_RULES} rules of the policy."
    )
    found = " ".join(_describe(comparison, against_best, config))
    if untested := [task.name for task in config.tasks if task.name not in comparison.tasks]:
        found += f" Without test examples: {', '.join(untested)}."
    return {"passed": passed, "verdict": f"{decision} {found}", "reasons": reasons}


def _untested_reason(comparison: Comparison, config: RunConfig) -> str | None:
    behaviour = [task.name for task in config.tasks if not task.needs_query]
    if not behaviour or not {*behaviour}.isdisjoint(comparison.tasks):
        return None
    return (
        f"There is no lift over the behaviour tasks, since none of them ({', '.join(behaviour)}) has test examples; "
        "search tasks decide only in a run that has no others."
    )


def _lift_reason(headline: Comparison, policy: GatePolicy, kind: str) -> str | None:
    low = headline.ratio_interval(policy.confidence)[0]
    if low >= policy.min_lift:
        return None
    if not np.isfinite(headline.ratio):
        return f"There is no lift, since target attention finds nothing in any of the {kind}."
    if not np.isfinite(low):
        smallest = int(headline.units.argmin())
        return (
            f"The lift in mean recall over the {kind} is {headline.ratio:+.1%}, with {NO_INTERVAL}: "
            f"{headline.units[smallest]} in {headline.tasks[smallest]}, where {MIN_UNITS} are needed."
        )
    return (
        f"The lift in mean recall over the {kind} is {headline.ratio:+.1%}, and the lower bound of its "
        f"{policy.confidence:.0%} interval {low:+.1%}, below the required {policy.min_lift:+.1%}."
    )


def _tasks_won_reason(headline: Comparison, policy: GatePolicy, kind: str) -> str | None:
    won, total = int(headline.won(policy.confidence).sum()), len(headline.tasks)
    if won >= policy.min_tasks_won:
        return None
    return (
        f"URM is ahead beyond chance in {won} of {count(total, kind)} ({policy.confidence:.0%} confidence, "
        f"Holm-corrected), below the required {policy.min_tasks_won}."
    )


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


def _best_reason(best: Comparison, policy: GatePolicy, kind: str) -> str | None:
    low, high = best.ratio_interval(policy.confidence)
    if not high < 0:
        return None
    return (
        f"Proven behind {title(best.names[1])}, the best of the other models in the mean over the {kind}: "
        f"{best.ratio:+.1%} ({policy.confidence:.0%} interval {low:+.1%} to {high:+.1%})."
    )


def _cut_short_reason(rivals: Collection[str]) -> str | None:
    if not rivals:
        return None
    names = " and ".join(sorted(map(title, rivals)))
    return (
        f"The time limit ended the training of {names}, so that a lead may be over less than it can be: raise "
        "`max_seconds` of the baseline, or give it fewer epochs."
    )


def _describe(comparison: Comparison, best: Comparison, config: RunConfig) -> list[str]:
    """Sentences on the headline, its tasks, the best other model and the tasks beside it."""
    confidence, k = config.evaluation.gate.confidence, config.evaluation.k
    names, search = split_tasks(config, comparison.tasks)
    headline, kind = comparison.restrict(names), name_kind(config, names)
    cases = f"{int(headline.examples.sum()):,} held-out cases of {count(len(names), kind)}"
    lift = headline.ratio
    if not np.isfinite(lift):
        return [f"On {cases}, target attention recalls nothing, so that no lift in Recall@{k} is defined."]
    low, high = headline.ratio_interval(confidence)
    order = [place for place in np.argsort(headline.lift) if np.isfinite(headline.lift[place])]
    first, last = order[-1], order[0]
    undefined = len(names) - len(order)
    won = int(headline.won(confidence).sum())
    sentences = [
        (
            f"On {cases}, the {k} items it recalls hold {abs(lift):.1%} {'more' if lift >= 0 else 'less'} of what "
            f"users then chose than those of the target-attention model ({describe_interval(low, high, confidence)}; "
            f"mean of the tasks' lifts {headline.mean_lift:+.1%})."
        ),
        (
            f"It is ahead beyond chance in {won} of {len(names)}, does best in {headline.tasks[first]} "
            f"({headline.lift[first]:+.1%}) and worst in {headline.tasks[last]} ({headline.lift[last]:+.1%})."
        ),
    ]
    if undefined:
        sentences.append(f"In {undefined} more target attention recalls nothing, so that no lift is defined.")
    if best.names[1] != comparison.names[1]:
        sentences.append(f"Against {title(best.names[1])}, the best other model: {describe_lift(best, confidence)}.")
    if search:
        beside = comparison.restrict(search)
        sentences.append(f"Search tasks, judged apart ({len(search)}): {describe_lift(beside, confidence)}.")
    return sentences
