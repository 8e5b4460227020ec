"""Several finished runs as one table: mean and standard deviation over seeds, intervals pooled over seeds.

Runs of one configuration that differ in their seed are repetitions. For the interval they are pooled: the bootstrap
draws users, each with the examples of every seed, so that neither seeds nor examples count as independent users.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd

from components.addresses import fetch
from components.evaluation.bootstrap import Comparison, compare
from components.evaluation.report import describe_best_other, markdown, title
from components.evaluation.summary import BASELINE, CANDIDATE, find_best_other, order_models
from components.exceptions import DataError
from components.schemas.hits import HITS
from components.settings import Settings
from components.storage import require_result
from components.tracking import track_study


@dataclass(frozen=True)
class FinishedRun:
    """An evaluated run."""

    run_dir: str  # its folder or URI
    config: str
    metrics: dict[str, Any]  # of its evaluation
    hits: str  # URI of its per-example record


@dataclass(frozen=True)
class Summary:
    """The runs of one configuration."""

    config: str
    seeds: tuple[int, ...]
    k: int
    models: tuple[str, ...]  # of all runs, in the order of the tables
    left_out: tuple[str, ...]  # models that not every run has
    # one row per seed, task and model: columns seed, task, model, recall; the task "mean" is their mean
    recalls: pd.DataFrame
    baseline: Comparison  # URM against target attention, pooled
    best: Comparison  # URM against the best other model in the mean, pooled


def compare_runs(run_dirs: Sequence[str], *, settings: Settings, draws: int, confidence: float) -> str:
    """Read, pool and render evaluated runs as Markdown, which goes to MLflow's experiment `comparison` as well.

    Raises:
        MissingInputError: A run has no evaluation.
        DataError: Runs of one configuration cannot be pooled.
    """
    runs = [read_run(run_dir) for run_dir in run_dirs]
    summaries = summarise_runs(runs, cache=settings.cache_path / "inputs", draws=draws)
    text = render(summaries, confidence)
    with track_study(settings, "comparison", " ".join(summary.config for summary in summaries)):
        mlflow.log_params({"draws": draws, "confidence": confidence, "runs": len(runs)})
        mlflow.log_table(as_frame(summaries, confidence), "comparison.json")
        mlflow.log_text(text, "comparison.md")
    return text


def read_run(run_dir: str) -> FinishedRun:
    """The evaluation of a run.

    Raises:
        MissingInputError: The run has none.
    """
    result = require_result(run_dir, "evaluate")
    return FinishedRun(run_dir, result.config, result.metrics, result.outputs["hits"])


def summarise_runs(runs: Sequence[FinishedRun], *, cache: Path, draws: int, seed: int = 0) -> list[Summary]:
    """One summary per configuration of evaluated runs, in the order given, by this many bootstrap draws of this seed.

    Raises:
        DataError: Runs of one configuration share a seed, or differ in cut-off or tasks.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(run.config, []).append(run)
    return [_summarise(group, cache, draws, seed) for group in groups.values()]


def render(summaries: Sequence[Summary], confidence: float) -> str:
    """Markdown: for each configuration a table of tasks and models, and URM against the best other model."""
    parts: list[str] = []
    for summary in summaries:
        seeds = ", ".join(str(seed) for seed in summary.seeds)
        parts += [
            f"## {summary.config}: Recall@{summary.k}, seeds {seeds}",
            _table(summary, confidence),
            describe_best_other(_standing(summary.best, confidence), confidence),
        ]
        if summary.left_out:
            parts.append(f"Not every run has {', '.join(map(title, summary.left_out))}, left out here.")
    return "\n\n".join(parts) + "\n"


def as_frame(summaries: Sequence[Summary], confidence: float) -> pd.DataFrame:
    """One row per configuration, task and model: mean and standard deviation over seeds, and URM's lift over it."""
    frames = []
    for summary in summaries:
        grouped = summary.recalls.groupby(["task", "model"], sort=False)["recall"]
        frame = grouped.agg(["mean", "std"]).reset_index().assign(config=summary.config, seeds=len(summary.seeds))
        lifts = dict(zip((*summary.baseline.tasks, "mean"), _lifts(summary, confidence), strict=True))
        of_urm = frame["model"] == CANDIDATE
        for place, name in enumerate(("lift", "low", "high")):
            frame[name] = [
                lifts[task][place] if is_urm and task in lifts else None
                for task, is_urm in zip(frame["task"], of_urm, strict=True)
            ]
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def _summarise(runs: list[FinishedRun], cache: Path, draws: int, seed: int) -> Summary:
    _check_comparable(runs)
    k = int(runs[0].metrics["k"])
    of_runs = [set(run.metrics["mean_recall"]) for run in runs]
    common = set.intersection(*of_runs)
    rows = [
        {"seed": run.metrics["seed"], "task": task, "model": model, "recall": value}
        for run in runs
        for task, recalls in _recalls(run.metrics).items()
        for model, value in recalls.items()
        if model in common
    ]
    recalls = pd.DataFrame(rows)
    means = recalls[recalls["task"] == "mean"].groupby("model")["recall"].mean()
    best = find_best_other({str(model): float(value) for model, value in means.items()})
    hits = _pool(runs, k, {CANDIDATE, BASELINE, best}, cache)
    baseline = compare(hits, CANDIDATE, BASELINE, k=k, draws=draws, seed=seed)
    return Summary(
        config=runs[0].config,
        seeds=tuple(int(run.metrics["seed"]) for run in runs),
        k=k,
        models=order_models(means.index),
        left_out=order_models(set.union(*of_runs) - common),
        recalls=recalls,
        baseline=baseline,
        best=baseline if best == BASELINE else compare(hits, CANDIDATE, best, k=k, draws=draws, seed=seed),
    )


def _check_comparable(runs: list[FinishedRun]) -> None:
    first, seen = runs[0], set()
    for run in runs:
        seed, metrics = run.metrics["seed"], run.metrics
        same = metrics["k"] == first.metrics["k"] and metrics["tasks"].keys() == first.metrics["tasks"].keys()
        if seed in seen or not same:
            raise DataError(
                f"run {run.run_dir}",
                expected=f"another seed, and the cut-off and tasks of {first.run_dir}",
                got=f"seed {seed}" if same else "others",
                remedy="compare runs of one configuration that differ in --set seed=… only",
            )
        seen.add(seed)


def _recalls(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {task: result["recall"] for task, result in metrics["tasks"].items()} | {"mean": metrics["mean_recall"]}


def _pool(runs: list[FinishedRun], k: int, models: set[str], cache: Path) -> pd.DataFrame:
    """Per-example records of all seeds; examples of different seeds stay distinct."""
    wanted = [("k", "==", k), ("model", "in", sorted(models))]
    parts: list[pd.DataFrame] = []
    offset = 0
    for run in runs:
        part = pd.read_parquet(fetch(run.hits, cache), columns=HITS.names, filters=wanted)
        parts.append(part.assign(example_id=part["example_id"] + offset))
        offset += int(part["example_id"].max()) + 1
    return pd.concat(parts, ignore_index=True)


def _table(summary: Summary, confidence: float) -> str:
    grouped = summary.recalls.groupby(["task", "model"])["recall"]
    means, deviations = grouped.mean(), grouped.std()
    lifts = [*_lifts(summary, confidence)]
    examples = [*summary.baseline.examples.tolist(), int(summary.baseline.examples.sum())]
    rows = []
    for task, count, lift in zip((*summary.baseline.tasks, "mean"), examples, lifts, strict=True):
        cells = [_cell(means[task, model], deviations[task, model]) for model in summary.models]
        rows.append([task, str(count), *cells, _lift(*lift)])
    head = ["task", "examples", *map(title, summary.models), f"lift of URM [{confidence:.0%}]"]
    return markdown(head, rows)


def _lifts(summary: Summary, confidence: float) -> list[tuple[float, float, float]]:
    """Lift over target attention with its interval: one per task, and the mean of the tasks' lifts last."""
    comparison = summary.baseline
    low, high = comparison.interval(confidence)
    by_task = zip(comparison.lift.tolist(), low.tolist(), high.tolist(), strict=True)
    return [*by_task, (comparison.mean_lift, *comparison.mean_interval(confidence))]


def _standing(best: Comparison, confidence: float) -> dict[str, Any]:
    low, high = best.difference_interval(confidence)
    return {"model": best.names[1], "difference": best.mean_difference, "low": low, "high": high}


def _cell(mean: float, deviation: float) -> str:
    return f"{mean:.4f}" if pd.isna(deviation) else f"{mean:.4f} ± {deviation:.4f}"


def _lift(lift: float, low: float, high: float) -> str:
    return f"{100 * lift:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]" if pd.notna(lift) else "undefined"
