"""Several finished runs as one report: mean and standard deviation over seeds, intervals pooled over seeds.

Runs of one configuration that differ in their seed are repetitions. For the interval they are pooled: the bootstrap
draws users, each with the examples of every seed, so that neither seeds nor examples count as independent users.

Older records lack what was not kept then (NDCG, lists' tops, held-out categories, what kind a task is). What the
configuration says is read there; what is unknown is said.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from components.addresses import fetch
from components.config import load_named_config
from components.evaluation.bootstrap import Comparison, compare, relative_lift
from components.evaluation.report import (
    describe_best_other,
    describe_group,
    describe_interval,
    format_lift,
    markdown,
    title,
)
from components.evaluation.summary import (
    BASELINE,
    CANDIDATE,
    TOP,
    describe_standing,
    find_best_other,
    order_models,
    sum_up,
)
from components.exceptions import DataError
from components.schemas.hits import read_hits
from components.settings import Settings
from components.storage import require_result
from components.tracking import track_study


@dataclass(frozen=True)
class Kind:
    """What a task asks for."""

    search: bool  # with a query, made from the target
    exclude_bought: bool  # items of the history are no candidates
    held_out: bool  # by queries whose categories no training query names


@dataclass(frozen=True)
class FinishedRun:
    """An evaluated run."""

    run_dir: str  # its folder or URI
    config: str
    metrics: dict[str, Any]  # of its evaluation
    kinds: dict[str, Kind]  # by task
    hits: str  # URI of its per-example record

    @property
    def headline(self) -> list[str]:
        """Tasks of the headline: those without a query, or all where each has one."""
        return [task for task, kind in self.kinds.items() if not kind.search] or list(self.kinds)


@dataclass(frozen=True)
class Summary:
    """The runs of one configuration."""

    config: str
    seeds: tuple[int, ...]
    k: int
    models: tuple[str, ...]  # of all runs, in the order of the tables
    left_out: tuple[str, ...]  # models that not every run has
    kinds: dict[str, Kind]  # by task, in the order of the tables
    recalls: pd.DataFrame  # one row per seed, task and model: columns seed, task, model, recall
    top: pd.DataFrame  # recall and NDCG at 5 and 10: columns task, metric, model, value; empty if a record lacks them
    baseline: Comparison  # URM against target attention, pooled
    best_name: str  # the best other model in the mean over the headline's tasks
    best: Comparison | None  # URM against it, pooled; None where its per-example record was not kept

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Tasks of the headline first, then those beside it, by the name of their kind; none is empty."""
        behaviour, search = (
            tuple(task for task, kind in self.kinds.items() if kind.search is wanted) for wanted in (False, True)
        )
        return {name: tasks for name, tasks in (("behaviour tasks", behaviour), ("search tasks", search)) if tasks}

    def ratios(self, tasks: Iterable[str]) -> list[float]:
        """URM's mean recall over some of the tasks relative to that of target attention, in each seed's training."""
        means = mean_recalls(self.recalls, tasks).pivot(index="seed", columns="model", values="recall")
        means = means.loc[list(self.seeds)]
        lifts = relative_lift(means[CANDIDATE].to_numpy(), means[BASELINE].to_numpy())
        return [float(lift) for lift in lifts]


def compare_runs(run_dirs: Sequence[str], *, settings: Settings, draws: int, confidence: float) -> str:
    """Read, pool and render evaluated runs as Markdown, which goes to MLflow's experiment `comparison` as well.

    Raises:
        MissingInputError: A run has no evaluation.
        DataError: Runs of one configuration cannot be pooled.
    """
    runs = [read_run(run_dir, settings.configs_dir) for run_dir in run_dirs]
    summaries = summarise_runs(runs, cache=settings.cache_path / "inputs", draws=draws)
    text = render(summaries, confidence)
    with track_study(settings, "comparison", " ".join(summary.config for summary in summaries)):
        mlflow.log_params({"draws": draws, "confidence": confidence, "runs": len(runs)})
        mlflow.log_metrics(_headlines(summaries, confidence))
        mlflow.log_table(as_frame(summaries, confidence), "comparison.json")
        mlflow.log_text(text, "comparison.md")
    return text


def read_run(run_dir: str, configs_dir: Path) -> FinishedRun:
    """The evaluation of a run; what kinds its tasks are of is read from its configuration where the record is older.

    Raises:
        MissingInputError: The run has none.
        ConfigError: An older record's configuration is not there any more, or lacks one of its tasks.
    """
    result = require_result(run_dir, "evaluate")
    tasks: dict[str, dict[str, Any]] = result.metrics["tasks"]
    if all("search" in task for task in tasks.values()):
        kinds = {
            name: Kind(task["search"], task["exclude_bought"], task["held_out_categories"] > 0)
            for name, task in tasks.items()
        }
    else:
        config = load_named_config(result.config, configs_dir)
        known = {name: config.task(name) for name in tasks}
        kinds = {name: Kind(task.needs_query, task.exclude_bought, not task.trains) for name, task in known.items()}
    return FinishedRun(run_dir, result.config, result.metrics, kinds, result.outputs["hits"])


def summarise_runs(runs: Sequence[FinishedRun], *, cache: Path, draws: int, seed: int = 0) -> list[Summary]:
    """One summary per configuration of evaluated runs, in the order given, by this many bootstrap draws of this seed.

    Raises:
        DataError: Runs of one configuration share a seed, or differ in cut-off or tasks.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.config, []).append(run)
    return [_summarise(group, cache, draws, seed) for group in groups.values()]


def mean_recalls(recalls: pd.DataFrame, tasks: Iterable[str]) -> pd.DataFrame:
    """Mean over some of the tasks in `Summary.recalls`: one row per seed and model."""
    some = recalls[recalls["task"].isin(tuple(tasks))]
    return some.groupby(["seed", "model"], sort=False)["recall"].mean().reset_index()


def render(summaries: Sequence[Summary], confidence: float) -> str:
    """Markdown: for each configuration the headline, a table per kind of task, and URM against the best other model."""
    parts: list[str] = []
    for summary in summaries:
        seeds = ", ".join(str(seed) for seed in summary.seeds)
        parts.append(f"## {summary.config}: Recall@{summary.k}, seeds {seeds}")
        for place, (kind, tasks) in enumerate(summary.groups.items()):
            parts += [
                f"### {kind.capitalize()}",
                describe_group(sum_up(summary.baseline.restrict(tasks), confidence), len(tasks), kind, confidence),
                _table(summary, tasks, confidence),
            ]
            if len(summary.seeds) > 1 and np.isfinite(summary.ratios(tasks)).all():
                parts.append(_describe_trainings(summary, tasks, confidence))
            if place == 0:
                parts.append(_describe_best(summary, tasks, confidence))
        parts += _describe_held_out(summary)
        parts += _render_top(summary)
        if summary.left_out:
            parts.append(f"Not every run has {', '.join(map(title, summary.left_out))}, left out here.")
    return "\n\n".join(parts) + "\n"


def as_frame(summaries: Sequence[Summary], confidence: float) -> pd.DataFrame:
    """One row per configuration, task and model: mean and standard deviation over seeds, and URM's lift over it.

    After the tasks stand the means, named `mean of behaviour tasks` and `mean of search tasks`, with ratios of means.
    """
    frames = []
    for summary in summaries:
        lifts = dict(zip(summary.baseline.tasks, _lifts(summary.baseline, confidence), strict=True))
        parts = [summary.recalls]
        for kind, tasks in summary.groups.items():
            group = summary.baseline.restrict(tasks)
            lifts[f"mean of {kind}"] = (group.ratio, *group.ratio_interval(confidence))
            parts.append(mean_recalls(summary.recalls, tasks).assign(task=f"mean of {kind}"))
        grouped = pd.concat(parts).groupby(["task", "model"], sort=False)["recall"]
        frame = grouped.agg(["mean", "std"]).reset_index().assign(config=summary.config, seeds=len(summary.seeds))
        of_urm = frame["model"] == CANDIDATE
        for place, name in enumerate(("lift", "low", "high")):
            frame[name] = [
                lifts[task][place] if is_urm else None for task, is_urm in zip(frame["task"], of_urm, strict=True)
            ]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _headlines(summaries: Sequence[Summary], confidence: float) -> dict[str, float]:
    """Lift of the mean and mean of the lifts of each configuration's groups, by MLflow's names of metrics."""
    return {
        f"{summary.config}.{kind.split()[0]}.{name}": value
        for summary in summaries
        for kind, tasks in summary.groups.items()
        for name, value in sum_up(summary.baseline.restrict(tasks), confidence).items()
        if value is not None
    }


def _summarise(runs: list[FinishedRun], cache: Path, draws: int, seed: int) -> Summary:
    check_comparable(runs)
    k = int(runs[0].metrics["k"])
    of_runs = [set(run.metrics["mean_recall"]) for run in runs]
    common = set.intersection(*of_runs)
    rows = [
        {"seed": run.metrics["seed"], "task": task, "model": model, "recall": value}
        for run in runs
        for task, result in run.metrics["tasks"].items()
        for model, value in result["recall"].items()
        if model in common
    ]
    recalls = pd.DataFrame(rows)
    kinds = runs[0].kinds
    means = mean_recalls(recalls, runs[0].headline).groupby("model")["recall"].mean()
    best_name = find_best_other({str(model): float(value) for model, value in means.items()})
    hits = _pool(runs, k, {CANDIDATE, BASELINE, best_name}, cache)
    against = {
        other: compare(hits, CANDIDATE, other, k=k, draws=draws, seed=seed)
        for other in {BASELINE, best_name}
        if (hits["model"] == other).sum() == (hits["model"] == CANDIDATE).sum()
    }
    return Summary(
        config=runs[0].config,
        seeds=tuple(int(run.metrics["seed"]) for run in runs),
        k=k,
        models=order_models(means.index),
        left_out=order_models(set.union(*of_runs) - common),
        kinds=kinds,
        recalls=recalls,
        top=_read_top(runs, common),
        baseline=against[BASELINE],
        best_name=best_name,
        best=against.get(best_name),
    )


def check_comparable(runs: Sequence[FinishedRun]) -> None:
    """Make sure that runs are repetitions of one configuration.

    Raises:
        DataError: They share a seed, or differ in cut-off, tasks or settings.
    """
    first, seen = runs[0], set()
    says = next((run for run in runs if "settings" in run.metrics), first)
    for run in runs:
        seed, metrics = run.metrics["seed"], run.metrics
        same = metrics["k"] == first.metrics["k"] and metrics["tasks"].keys() == first.metrics["tasks"].keys()
        same &= run.kinds == first.kinds
        if "settings" in metrics:  # older records do not say
            same &= metrics["settings"] == says.metrics["settings"]
        if seed in seen or not same:
            raise DataError(
                f"run {run.run_dir}",
                expected=f"another seed, and the cut-off, tasks and settings of {first.run_dir}",
                got=f"seed {seed}" if same else "others",
                remedy="compare runs of one configuration that differ in --set seed=… only",
            )
        seen.add(seed)


def _read_top(runs: list[FinishedRun], models: set[str]) -> pd.DataFrame:
    """Recall and NDCG at the top of the lists, mean over the runs; empty unless every run has them."""
    rows = [
        {"task": task, "metric": metric, "model": model, "value": values[model]}
        for run in runs
        for task, result in run.metrics["tasks"].items()
        for metric, values in result.get("top", {}).items()
        for model in models
    ]
    frame = pd.DataFrame(rows, columns=["task", "metric", "model", "value"])
    grouped = frame.groupby(["task", "metric", "model"], sort=False)["value"].agg(["mean", "count"]).reset_index()
    if not (grouped["count"] == len(runs)).all():
        return frame.iloc[:0]
    return grouped.rename(columns={"mean": "value"}).drop(columns="count")


def _pool(runs: list[FinishedRun], k: int, models: set[str], cache: Path) -> pd.DataFrame:
    """Per-example records of all seeds; examples of different seeds stay distinct."""
    parts: list[pd.DataFrame] = []
    offset = 0
    for run in runs:
        part = read_hits(str(fetch(run.hits, cache)), k, models)
        parts.append(part.assign(example_id=part["example_id"] + offset))
        offset += int(part["example_id"].max()) + 1
    return pd.concat(parts, ignore_index=True)


def _table(summary: Summary, tasks: Sequence[str], confidence: float) -> str:
    grouped = summary.recalls.groupby(["task", "model"])["recall"]
    means, deviations = grouped.mean(), grouped.std()
    group = summary.baseline.restrict(tasks)
    lifts = dict(zip(group.tasks, _lifts(group, confidence), strict=True))
    examples = dict(zip(group.tasks, group.examples.tolist(), strict=True))
    rows = []
    for task in tasks:
        cells = [_cell(means[task, model], deviations[task, model]) for model in summary.models]
        history = "filtered" if summary.kinds[task].exclude_bought else "kept"
        rows.append([task, str(examples[task]), history, *cells, format_lift(*lifts[task])])
    of_group = mean_recalls(summary.recalls, tasks).groupby("model")["recall"]
    cells = [_cell(of_group.mean()[model], of_group.std()[model]) for model in summary.models]
    ratio = format_lift(group.ratio, *group.ratio_interval(confidence))
    mean_lift = format_lift(group.mean_lift, *group.mean_interval(confidence))
    rows.append(["**mean**", str(sum(examples.values())), "", *cells, ratio])
    rows.append(["mean of the lifts", "", "", *("" for _ in cells), mean_lift])
    head = ["task", "examples", "history items", *map(title, summary.models), f"lift of URM [{confidence:.0%}]"]
    return markdown(head, rows)


def _lifts(comparison: Comparison, confidence: float) -> list[tuple[float, float, float]]:
    """Lift of each task over target attention with its interval."""
    low, high = comparison.interval(confidence)
    return list(zip(comparison.lift.tolist(), low.tolist(), high.tolist(), strict=True))


def _describe_trainings(summary: Summary, tasks: Sequence[str], confidence: float) -> str:
    ratios = summary.ratios(tasks)
    interval = summary.baseline.restrict(tasks).training_interval(ratios, confidence)
    lifts = ", ".join(f"{ratio:+.1%}" for ratio in ratios)
    return f"With chance from training to training ({lifts}): {describe_interval(*interval, confidence)}."


def _describe_best(summary: Summary, tasks: Sequence[str], confidence: float) -> str:
    if summary.best is not None:
        return describe_best_other(describe_standing(summary.best.restrict(tasks), confidence), confidence)
    means = mean_recalls(summary.recalls, tasks).groupby("model")["recall"].mean()
    return (
        f"Best of the other models in the mean is {title(summary.best_name)}. Its per-example record was not kept, so "
        f"that the difference in mean recall, {means[CANDIDATE] - means[summary.best_name]:+.4f}, has no interval."
    )


def _describe_held_out(summary: Summary) -> list[str]:
    counts = dict(zip(summary.baseline.tasks, summary.baseline.categories.tolist(), strict=True))
    return [
        f"The interval of {task} draws its held-out categories ({counts[task]}) as well as the users."
        if counts[task]
        else f"The interval of {task} draws users alone, since a record lacks the categories: it is too narrow."
        for task, kind in summary.kinds.items()
        if kind.held_out
    ]


def _render_top(summary: Summary) -> list[str]:
    if summary.top.empty:
        return [f"Not every record has {', '.join(TOP)}."]
    values = summary.top.set_index(["task", "metric", "model"])["value"]
    rows = [
        [task, metric, *(f"{values[task, metric, model]:.4f}" for model in summary.models)]
        for task in summary.kinds
        for metric in dict.fromkeys(summary.top["metric"])
    ]
    return ["### The top of the lists", markdown(["task", "metric", *map(title, summary.models)], rows)]


def _cell(mean: float, deviation: float) -> str:
    return f"{mean:.4f}" if pd.isna(deviation) else f"{mean:.4f} ± {deviation:.4f}"
