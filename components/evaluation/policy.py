"""The policy of the gate (ADR 27): whether the model may be released, and why, in words."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from components.config import GatePolicy, RunConfig
from components.evaluation.bootstrap import MIN_UNITS, Comparison
from components.evaluation.power import describe_power, errors_of
from components.evaluation.report import NO_INTERVAL, count, describe_interval, describe_lift, title
from components.evaluation.summary import name_kind, split_tasks

NUM_RULES = 5
MIN_TRAININGS = 3  # of `evaluation.gate.trainings: require`


def judge(
    comparison: Comparison,
    best: Comparison,
    config: RunConfig,
    cut_short: Collection[str] = (),
    earlier: Sequence[float] = (),
) -> dict[str, Any]:
    """Hold a comparison against the policy: passed, the verdict for people, a reason for each rule that is not met.

    Args:
        comparison: URM against target attention, all tasks.
        best: URM against the best other model in the mean over the headline's tasks, all tasks.
        config: Of the run: its tasks, cut-off and policy.
        cut_short: Models whose training its time limit ended.
        earlier: Lifts of earlier trainings by equal settings.
    """
    policy = config.evaluation.gate
    names, _ = split_tasks(config, comparison.tasks)
    trainings = [comparison.restrict(names).ratio, *earlier]
    headline, against_best, kind = comparison.restrict(names), best.restrict(names), name_kind(config, names)
    reasons = [
        reason
        for reason in (
            _untested_reason(comparison, config) or _lift_reason(headline, policy, kind, trainings),
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
    sentences = _describe(comparison, against_best, config) + _describe_certainty(headline, policy, trainings)
    found = " ".join(sentences)
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


def _lift_reason(headline: Comparison, policy: GatePolicy, kind: str, trainings: Sequence[float]) -> str | None:
    if policy.trainings == "require":
        return _trainings_reason(headline, policy, kind, trainings)
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


def _trainings_reason(headline: Comparison, policy: GatePolicy, kind: str, trainings: Sequence[float]) -> str | None:
    if len(trainings) < MIN_TRAININGS:
        return (
            f"The lift needs {MIN_TRAININGS} trainings that differ in the seed (`evaluation.gate.trainings: require`), "
            f"and there {'is' if len(trainings) == 1 else 'are'} {len(trainings)}: run the pipeline with another seed."
        )
    low = find_training_interval(headline, trainings, policy.confidence)[0]
    if low >= policy.min_lift:
        return None
    found = f"{np.mean(trainings):+.1%} in {len(trainings)} trainings"
    if not np.isfinite(low):
        return f"The lift in mean recall over the {kind} is {found}, with {NO_INTERVAL}."
    return (
        f"The lift in mean recall over the {kind} is {found}, and the lower bound of its {policy.confidence:.0%} "
        f"interval with chance of training {low:+.1%}, below the required {policy.min_lift:+.1%}."
    )


def find_training_interval(headline: Comparison, trainings: Sequence[float], confidence: float) -> tuple[float, float]:
    """Interval of the mean lift of several trainings, whose users vary as those of this one do."""
    error, quantile = headline.training_spread(trainings, confidence)
    mean = float(np.mean(trainings))
    return mean - quantile * error, mean + quantile * error


def _describe_certainty(headline: Comparison, policy: GatePolicy, trainings: Sequence[float]) -> list[str]:
    """The interval with chance of training, where there are two, and what lift would be proven."""
    sentences = []
    if len(trainings) > 1:
        interval = find_training_interval(headline, trainings, policy.confidence)
        sentences.append(
            f"With chance of training, over {len(trainings)} trainings: {np.mean(trainings):+.1%} "
            f"({describe_interval(*interval, policy.confidence)})."
        )
    deciding = trainings if policy.trainings == "require" and len(trainings) >= MIN_TRAININGS else None
    error, quantile = errors_of(headline, policy.confidence, deciding)
    return [*sentences, describe_power(error, quantile, policy.min_lift)]


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
