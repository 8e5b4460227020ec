"""Tables of docs/results/ that come from the kept records in benchmarks/evaluations.

Seeds of one data set are pooled as `urm compare` pools them: a user drawn by the bootstrap brings the examples of every
seed. A *behaviour task* has no query; the query of a *search task* is made from its target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from components.config import load_named_config
from components.evaluation.bootstrap import Comparison
from components.evaluation.models import find_cut_short
from components.evaluation.policy import judge
from components.evaluation.report import markdown, title
from components.evaluation.summary import BASELINE, CANDIDATE
from components.exceptions import MissingInputError
from components.storage import StageResult, load_result
from components.studies.ablation.summary import CONFIDENCE, DRAWS
from components.studies.comparison import FinishedRun, Summary, mean_recalls, read_run, summarise_runs

Table = Callable[[], str]
REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
FOLDER = Path(__file__).parent / "evaluations"
DATA_SETS = {
    "amazon_beauty": "Amazon Beauty",
    "amazon_sports": "Amazon Sports",
    "amazon_toys": "Amazon Toys",
    "complete_journey": "Complete Journey",
}
SEEDS = (0, 1, 2)


READERS = ("bm25", "bm25f", "category_rule", "text", "mix")  # rivals that read the words of a query
FILTERED_TASK = "cold_item"  # the 5-core filter of the Amazon sets makes its targets more frequent than such items are
HISTORY = "history items"
UNDEFINED = "undefined"  # a lift over a model that finds nothing


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        value: The value.
        low: Lower end of its interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def percent(self) -> str:
        """`+5.2 %`."""
        return f"{_percent(self.value)} %" if math.isfinite(self.value) else UNDEFINED

    @property
    def percent_interval(self) -> str:
        """`+4.0 … +6.5`, in per cent."""
        if not math.isfinite(self.low):
            return UNDEFINED
        return f"{_percent(self.low)} … {_percent(self.high)}"

    @property
    def difference(self) -> str:
        """`+.0015`."""
        return _difference(self.value)

    @property
    def difference_interval(self) -> str:
        """`−.0009 … +.0040`."""
        return f"{_difference(self.low)} … {_difference(self.high)}"


def render_headline() -> str:
    """All data sets against the tuned rival: the lift with chance of training, and the tasks that differ."""
    rows = []
    for config, name in DATA_SETS.items():
        if len(seeds := find_tuned_seeds(config)) < 2:
            continue
        summary = pool_seeds(f"{config}-tuned", seeds)
        behaviour = summary.groups["behaviour tasks"]
        of_behaviour = summary.baseline.restrict(behaviour)
        interval = of_behaviour.training_interval(summary.ratios(behaviour), CONFIDENCE)
        lift = Figure(find_ratio(of_behaviour).value, *interval)
        groups = [split_by_standing(summary.baseline.restrict(tasks)) for tasks in summary.groups.values()]
        ahead, level, behind = ([task for group in groups for task in group[place]] for place in range(3))
        where_not = [f"{what}: {', '.join(tasks)}" for what, tasks in (("level", level), ("behind", behind)) if tasks]
        rows.append([name, f"{lift.percent} ({lift.percent_interval})", ", ".join(ahead), "; ".join(where_not)])
    head = ["data set", "lift on behaviour tasks (95 %, with chance of training)", "ahead", "not ahead"]
    return markdown(head, rows).replace("---:", "---")


def render_lifts() -> str:
    """All data sets against the tuned rival: behaviour tasks, with search tasks apart."""
    rows = []
    for config, name in DATA_SETS.items():
        if not (seeds := find_tuned_seeds(config)):
            continue
        summary = pool_seeds(f"{config}-tuned", seeds)
        behaviour, search = summary.groups.values()
        of_behaviour, of_search = summary.baseline.restrict(behaviour), summary.baseline.restrict(search)
        mean, ratios = find_mean_lift(of_behaviour), [find_ratio(group) for group in (of_behaviour, of_search)]
        recalls = [show_mean_recall(summary, model, behaviour) for model in (CANDIDATE, BASELINE)]
        cells = [f"{ratio.percent} ({ratio.percent_interval})" for ratio in ratios]
        standings = [describe_standing(group) for group in (of_behaviour, of_search)]
        trainings = of_behaviour.training_interval(summary.ratios(behaviour), CONFIDENCE)
        chance = Figure(ratios[0].value, *trainings).percent_interval if len(seeds) > 1 else "one training"
        row = [name, " ".join(map(str, seeds)), *recalls, cells[0], chance, mean.percent, standings[0]]
        rows.append([*row, cells[1], standings[1]])
    standing = "ahead / level / behind"
    head = ["data set", "seeds", "behaviour tasks, Recall@100: URM", "target attention", "lift of the mean (95 %)"]
    head += ["with chance of training (95 %)", "mean of lifts", standing]
    head += ["search tasks: lift of the mean (95 %)", standing]
    return markdown(head, rows)


def render_behaviour() -> str:
    """Behaviour tasks of all data sets, and what the kept records lack."""
    rows = []
    for config, name in DATA_SETS.items():
        summary = pool_seeds(config, SEEDS)
        tasks = summary.groups["behaviour tasks"]
        comparison = summary.baseline.restrict(tasks)
        ratio, mean = find_ratio(comparison), find_mean_lift(comparison)
        by_seed = summary.ratios(tasks)
        filtered = sum(summary.kinds[task].exclude_bought for task in tasks)
        rows.append(
            [name, str(len(tasks)), str(filtered), f"{comparison.examples.sum():,}"]
            + [show_mean_recall(summary, model, tasks) for model in (CANDIDATE, BASELINE)]
            + [ratio.percent, ratio.percent_interval, " / ".join(map(_percent, by_seed))]
            + [
                _without(comparison, FILTERED_TASK),
                f"{mean.percent} ({mean.percent_interval})",
                describe_standing(comparison),
            ]
            + [_describe_best_other(summary, tasks), " / ".join(_ask_gate(config, seed) for seed in SEEDS)]
        )
    seeds = f"seed {' / '.join(map(str, SEEDS))}"
    head = ["data set", "tasks", "with history items filtered", "examples", "URM", "target attention"]
    head += ["ratio of means", "95 %", seeds, f"without `{FILTERED_TASK}` (95 %)", "mean of lifts (95 %)"]
    head += ["ahead / level / behind", "best other model", f"gate, {seeds}"]
    return markdown(head, rows)


def render_pooled(record: str, seeds: Sequence[int] = SEEDS) -> str:
    """Every task of a data set over its seeds: recall per model, lift with interval, lift per seed.

    `record` is the name of the records without the seed.

    Below stand the ratio of means over behaviour tasks and the mean of the lifts over all tasks.
    """
    summary = pool_seeds(record, tuple(seeds))
    known, behaviour = order_tasks(summary.config), summary.groups["behaviour tasks"]
    every = (*known, *(task for task in summary.baseline.tasks if task not in known))
    models = [model for model in summary.models if _mean_recall(summary, model, every) > 0]
    lifts = find_lifts(summary.baseline)
    counts = dict(zip(summary.baseline.tasks, summary.baseline.examples.tolist(), strict=True))
    runs = [read_evaluation(f"{record}-seed{seed}") for seed in seeds]
    lines: list[tuple[tuple[str, ...], str, Figure, Sequence[float | None]]] = [
        ((task,), task, lifts[task], [run.metrics["tasks"][task]["lift"] for run in runs]) for task in every
    ]
    ratios = summary.ratios(behaviour)
    lines.append(
        (behaviour, "behaviour tasks: ratio of means", find_ratio(summary.baseline.restrict(behaviour)), ratios)
    )
    means = [_find_mean_lift_of_run(run) for run in runs]
    lines.append((every, "all tasks: mean of lifts", find_mean_lift(summary.baseline), means))
    rows = []
    for tasks, label, lift, by_seed in lines:
        recalls = mean_recalls(summary.recalls, tasks).groupby("model")["recall"]
        average, deviations = recalls.mean(), recalls.std()
        spread = {model: f" ± {show_recall(deviations[model])}" for model in (CANDIDATE, BASELINE) if len(seeds) > 1}
        cells = [show_recall(average[model]) + spread.get(model, "") for model in models]
        seeds_cell = " / ".join(_percent(value) for value in by_seed)
        count = sum(counts[task] for task in tasks)
        history = _describe_history(summary, tasks)
        rows.append([label, f"{count:,}", history, *cells, lift.percent, lift.percent_interval, seeds_cell])
    head = ["task", "examples", HISTORY, *map(title, models), "lift", "95 %", f"seed {' / '.join(map(str, seeds))}"]
    return markdown(head, rows)


def render_run(folder: str) -> str:
    """Every task of one kept run: recall per model, lift with interval, p-value after Holm."""
    run = read_evaluation(folder)
    summary, every = summarise_run(folder, run.metrics["seed"]), order_tasks(run.config)
    lifts = find_lifts(summary.baseline)
    p_values = dict(zip(summary.baseline.tasks, summary.baseline.p_different().tolist(), strict=True))
    models = [model for model in summary.models if _mean_recall(summary, model, every) > 0]
    rows = []
    for task in every:
        result, lift = run.metrics["tasks"][task], lifts[task]
        recalls = [show_recall(result["recall"][model]) for model in models]
        cells = [*recalls, lift.percent, lift.percent_interval, show_recall(p_values[task])]
        rows.append([task, f"{result['examples']:,}", _describe_history(summary, [task]), *cells])
    lift = find_mean_lift(summary.baseline)
    means = [show_mean_recall(summary, model, every) for model in models]
    examples = sum(result["examples"] for result in run.metrics["tasks"].values())
    rows.append(["mean", f"{examples:,}", "", *means, lift.percent, lift.percent_interval, ""])
    return markdown(["task", "examples", HISTORY, *map(title, models), "lift", "95 %", "p (Holm)"], rows)


def render_search(tuned: bool) -> str:
    """The search tasks of all data sets, with the rivals that read words: the tuned comparisons, or those before."""
    rows = []
    summaries = {
        config: pool_seeds(f"{config}-tuned", find_tuned_seeds(config)) if tuned else pool_seeds(config, SEEDS)
        for config in DATA_SETS
    }
    known = {model for summary in summaries.values() for model in summary.recalls["model"]}
    models = [model for model in (*READERS, BASELINE, CANDIDATE) if model in known]
    for config, name in DATA_SETS.items():
        summary = summaries[config]
        behaviour = find_behaviour_tasks(config)
        means = summary.recalls.groupby(["task", "model"])["recall"].mean()
        lifts = find_lifts(summary.baseline)
        for task in order_tasks(config):
            if task not in behaviour:
                recalls = [show_recall(means[task, model]) if (task, model) in means else "" for model in models]
                history = _describe_history(summary, [task])
                rows.append([name, task, history, *recalls, lifts[task].percent, lifts[task].percent_interval])
    return markdown(["data set", "task", HISTORY, *map(title, models), "lift", "95 %"], rows)


def render_trainings() -> str:
    """How the kept headline runs were trained, and what is left above them."""
    rows = []
    for config in DATA_SETS:
        for seed in SEEDS:
            folder = f"{config}-seed{seed}"
            evaluation = read_result(folder, "evaluate")
            urm, baseline = (load_result(str(FOLDER / folder), stage) for stage in ("sft", "baseline"))
            cells = [
                *_describe_training(None if urm is None else urm.metrics["training"]),
                *_describe_training(None if baseline is None else baseline.metrics["training"][BASELINE]),
            ]
            ceiling = evaluation.metrics["ceiling"]
            share = f"{100 * ceiling['share']:.1f} %"
            rows.append([folder, f"{evaluation.finished_at:%Y-%m-%d}", *cells, show_recall(ceiling["mean"]), share])
    network = ("steps, ended by", "minutes", "validation at step")
    head = [f"{name}: {what}" for name in ("URM", "target attention") for what in network]
    return markdown(["record", "evaluated", *head, "ceiling", "URM's share"], rows)


@cache
def pool_seeds(record: str, seeds: tuple[int, ...]) -> Summary:
    """The kept runs of a data set, pooled over their seeds."""
    runs = [read_evaluation(f"{record}-seed{seed}") for seed in seeds]
    return summarise_runs(runs, cache=FOLDER, draws=DRAWS)[0]


@cache
def summarise_run(folder: str, seed: int) -> Summary:
    """One kept run by itself, with draws of this seed; its evaluation made those of its own."""
    return summarise_runs([read_evaluation(folder)], cache=FOLDER, draws=DRAWS, seed=seed)[0]


def find_tuned_seeds(config: str) -> tuple[int, ...]:
    """Seeds whose comparison with tuned rivals is kept."""
    return tuple(seed for seed in SEEDS if (FOLDER / f"{config}-tuned-seed{seed}").is_dir())


@cache
def find_behaviour_tasks(config: str) -> tuple[str, ...]:
    """Tasks of a configuration whose examples have no query."""
    return tuple(task.name for task in load_named_config(config, CONFIGS).tasks if not task.target.has_query)


@cache
def order_tasks(config: str) -> tuple[str, ...]:
    """Tasks of a configuration in its order."""
    return tuple(task.name for task in load_named_config(config, CONFIGS).tasks)


def find_lifts(comparison: Comparison) -> dict[str, Figure]:
    """Lift of each task over target attention."""
    low, high = comparison.interval(CONFIDENCE)
    values = zip(comparison.lift.tolist(), low.tolist(), high.tolist(), strict=True)
    return {task: Figure(*value) for task, value in zip(comparison.tasks, values, strict=True)}


def find_mean_lift(comparison: Comparison) -> Figure:
    """Mean of the tasks' lifts."""
    return Figure(comparison.mean_lift, *comparison.mean_interval(CONFIDENCE))


def find_ratio(comparison: Comparison) -> Figure:
    """Lift of the mean recall over the tasks."""
    return Figure(comparison.ratio, *comparison.ratio_interval(CONFIDENCE))


def _find_mean_lift_of_run(run: FinishedRun) -> float | None:
    """Mean of the lifts of one run's tasks that have one; None where none has."""
    lifts = [task["lift"] for task in run.metrics["tasks"].values() if task["lift"] is not None]
    return sum(lifts) / len(lifts) if lifts else None


def _without(comparison: Comparison, task: str) -> str:
    """Lift of the mean recall over the other tasks; empty where the task is not among them."""
    if task not in comparison.tasks:
        return ""
    lift = find_ratio(comparison.restrict(name for name in comparison.tasks if name != task))
    return f"{lift.percent} ({lift.percent_interval})"


def split_by_standing(comparison: Comparison) -> tuple[list[str], list[str], list[str]]:
    """Tasks in which URM is ahead beyond chance, level and behind beyond chance, Holm-corrected over these tasks."""
    won = comparison.won(CONFIDENCE)
    lost = (comparison.p_different() < 1 - CONFIDENCE) & (comparison.model < comparison.baseline)
    places = [[task for task, holds in zip(comparison.tasks, which, strict=True) if holds] for which in (won, lost)]
    return places[0], [task for task in comparison.tasks if task not in {*places[0], *places[1]}], places[1]


def describe_standing(comparison: Comparison) -> str:
    """How many tasks are ahead, level and behind."""
    return " / ".join(str(len(tasks)) for tasks in split_by_standing(comparison))


def _describe_history(summary: Summary, tasks: Iterable[str]) -> str:
    """Whether items of the user's history are candidates; empty where the tasks differ in it."""
    found = {"filtered" if summary.kinds[task].exclude_bought else "kept" for task in tasks}
    return found.pop() if len(found) == 1 else ""


def _describe_best_other(summary: Summary, tasks: Sequence[str]) -> str:
    """The best model but URM in the mean over the tasks, of those that every seed has."""
    recall = show_mean_recall(summary, summary.best_name, tasks)
    return f"{title(summary.best_name)}, {recall}{'' if summary.best is not None else ' (its hits were not kept)'}"


def _ask_gate(config: str, seed: int) -> str:
    """Whether the gate of the configuration, as it stands today, lets the kept run of that seed pass."""
    record = f"{config}-seed{seed}"
    summary = summarise_run(record, 0)  # the draws of the other tables
    if summary.best is None:
        return "not known"
    trained = load_result(str(FOLDER / record), "baseline")
    cut_short = [] if trained is None else find_cut_short(trained.metrics)
    verdict = judge(summary.baseline, summary.best, load_named_config(config, CONFIGS), cut_short)
    if verdict["passed"] and trained is None:
        return "not known"  # its trainings were not kept, and a limit may have ended one
    return "passes" if verdict["passed"] else "refused"


def show_mean_recall(summary: Summary, model: str, tasks: Iterable[str]) -> str:
    """Mean recall of a model over the tasks and seeds: `.299`."""
    return show_recall(_mean_recall(summary, model, tasks))


def _mean_recall(summary: Summary, model: str, tasks: Iterable[str]) -> float:
    recalls = mean_recalls(summary.recalls, tasks)
    return float(recalls[recalls["model"] == model]["recall"].mean())


@cache
def read_evaluation(folder: str) -> FinishedRun:
    """The evaluation of a kept run."""
    return read_run(str(FOLDER / folder), CONFIGS)


def read_result(folder: str, stage: str) -> StageResult:
    """What a stage left in a record.

    Raises:
        MissingInputError: The record lacks it.
    """
    result = load_result(str(FOLDER / folder), stage)
    if result is None:
        raise MissingInputError(
            f"record {folder}",
            expected=f"a result of stage {stage!r} in benchmarks/evaluations/{folder}",
            got="none",
            remedy="restore it or keep the run again with `python -m benchmarks.keep`",
        )
    return result


def _describe_training(training: dict[str, Any] | None) -> list[str]:
    """Steps with what ended them, minutes, best validation recall with its step."""
    if training is None:
        return ["not kept"] * 3
    best = training["best_recall"]
    recall = best["mean"] if isinstance(best, dict) else best
    return [
        f"{training['steps']:,}, {training['stopped_by']}",
        f"{training['seconds'] / 60:.1f}",
        f"{show_recall(recall, 4)} at {training['best_step']:,}",
    ]


def show_recall(value: float, digits: int = 3) -> str:
    """`.299`."""
    return f"{value:.{digits}f}".removeprefix("0")


def _percent(value: float | None) -> str:
    """`+5.2`, in per cent."""
    if value is None:
        return UNDEFINED
    return f"{100 * value:+.1f}".replace("-", "−")


def _difference(value: float) -> str:
    """`+.0015`."""
    return f"{value:+.4f}".replace("-", "−").replace("0.", ".", 1)


TABLES: dict[str, Table] = {
    "results_headline": render_headline,
    "results_lifts": render_lifts,
    "results_behaviour": render_behaviour,
    "results_search": partial(render_search, tuned=True),
    "results_search_before": partial(render_search, tuned=False),
    "results_trainings": render_trainings,
    **{f"results_{config}": partial(render_pooled, config) for config in DATA_SETS},
    "results_amazon_toys_two_seeds": partial(render_pooled, "amazon_toys", SEEDS[:2]),
    **{
        f"run_{folder}": partial(render_run, folder)
        for folder in (
            "amazon_beauty-seed0",
            "amazon_sports-before-seed0",
            "amazon_sports-seed0",
            "amazon_toys-seed0",
            "amazon_toys-seed1",
        )
    },
}
