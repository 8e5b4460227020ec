"""From measured models to the per-example record and the tables of metrics."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from components.config import RunConfig
from components.evaluation.bootstrap import Comparison
from components.evaluation.examples import Measured, TestExamples
from components.evaluation.metrics import Mask, Ranked, count_hits, ndcg, recall

BASELINE, CANDIDATE = "target_attention", "urm"
TITLES = {
    "popularity": "popularity",
    "own_history": "own history",
    "item_knn": "item-kNN",
    "bm25": "BM25",
    "bm25f": "BM25F",
    "category_rule": "category rule",
    "text": "text",
    "id_vectors": "ID vectors",
    "mix": "mix",
    "sasrec": "SASRec",
    "target_attention_text": "target attention + text",
    "target_attention": "target attention",
    "urm": "URM",
}
CUTOFFS = (5, 10, 20, 100, 500)
TOP = tuple(f"{metric}@{k}" for metric in ("recall", "ndcg") for k in (5, 10))  # what the literature reports


def order_models(names: Iterable[str]) -> tuple[str, ...]:
    """Models in the order of all tables; URM last, and one without a title before the baseline."""
    known = [*TITLES]
    place = {name: known.index(name) for name in known}
    return tuple(sorted(set(names), key=lambda name: (place.get(name, place[BASELINE] - 0.5), name)))


def cutoffs(k: int, depth: int) -> tuple[int, ...]:
    """Cut-offs reported beside the headline k: those that the lists are long enough for."""
    return tuple(sorted({k, *(other for other in CUTOFFS if other <= depth)}))


def split_tasks(config: RunConfig, tasks: Iterable[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Those that make the headline, and the search tasks beside them, of these tasks in the run's order.

    The headline is of *behaviour tasks*, which ask without words; the query of a *search task* is made from its target.
    Where no behaviour task is among these, the search tasks are the headline; the gate refuses that, unless the run
    has no behaviour task at all.
    """
    present = set(tasks)
    behaviour = tuple(task.name for task in config.tasks if task.name in present and not task.needs_query)
    search = tuple(task.name for task in config.tasks if task.name in present and task.needs_query)
    return (behaviour, search) if behaviour else (search, ())


def name_kind(config: RunConfig, tasks: Iterable[str]) -> str:
    """What the tasks of one group are called."""
    return "search tasks" if any(config.task(task).needs_query for task in tasks) else "behaviour tasks"


def record_hits(examples: TestExamples, model: str, ranked: Ranked, ks: Iterable[int]) -> pd.DataFrame:
    """The per-example record of a model, in the schema HITS."""
    parts = [
        pd.DataFrame(
            {
                "example_id": examples.ids,
                "user_id": examples.users,
                "task": examples.tasks,
                "model": model,
                "k": np.int32(k),
                "hits": count_hits(ranked, k).astype(np.int32),
                "targets": ranked.num_targets.astype(np.int32),
                "ndcg": ndcg(ranked, k).astype(np.float32),
                "held_out_query": examples.held_out_queries,
                "cut_ts": examples.cuts,
            }
        )
        for k in ks
    ]
    return pd.concat(parts, ignore_index=True)


def tabulate(examples: TestExamples, measured: Mapping[str, Measured], k: int, ks: Iterable[int]) -> pd.DataFrame:
    """One row per task and model: recall and NDCG at every cut-off, coverage, popularity bias and novelty at k."""
    quality = {
        model: {f"recall@{at}": _recall(result.ranked, at) for at in ks}
        | {f"ndcg@{at}": ndcg(result.ranked, at) for at in ks}
        for model, result in measured.items()
    }
    owners = np.repeat(np.arange(len(examples.ids)), np.diff(examples.target_offsets))
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(examples.tasks):
        mask = examples.tasks == task
        target_quantile = examples.popularity[examples.targets[mask[owners]]].mean()
        for model, result in measured.items():
            shown = result.exposure.shown[mask].sum()
            rows.append(
                {"task": task, "model": model, "examples": int(mask.sum())}
                | {name: float(values[mask].mean()) for name, values in quality[model].items()}
                | {
                    f"coverage@{k}": result.coverage[task],
                    f"popularity_bias@{k}": _share(result.exposure.quantile[mask].sum(), shown) - target_quantile,
                    f"novelty@{k}": _share(result.exposure.surprise[mask].sum(), shown),
                }
            )
    return pd.DataFrame(rows)


def tabulate_segments(examples: TestExamples, measured: Mapping[str, Measured], k: int) -> pd.DataFrame:
    """One row per segment, task and model: recall@k of the targets in the segment, over examples that have some.

    Under the task "all" stands the mean over the examples of all tasks.
    """
    rows: list[dict[str, Any]] = []
    for segment, (in_segment, targets) in examples.segments().items():
        for model, result in measured.items():
            ranked = result.ranked.keep(targets)
            asked: Mask = in_segment & (ranked.num_targets > 0)
            recalls = _recall(ranked, k)
            for task in ("all", *dict.fromkeys(examples.tasks)):
                mask = asked if task == "all" else asked & (examples.tasks == task)
                if mask.any():
                    row = {"segment": segment, "task": task, "model": model, "examples": int(mask.sum())}
                    rows.append(row | {f"recall@{k}": float(recalls[mask].mean())})
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame, comparison: Comparison, best: Comparison, config: RunConfig) -> dict[str, Any]:
    """The stage's metrics, as docs/architecture.md states them, tasks in the run's order; what is undefined is null.

    `table` is that of `tabulate`; `comparison` is URM against the baseline, `best` URM against the best other model in
    the mean over the headline's tasks.
    """
    confidence, k = config.evaluation.gate.confidence, config.evaluation.k
    headline, search = split_tasks(config, comparison.tasks)
    rows = {(row["task"], row["model"]): row for row in table.to_dict("records")}
    tasks: dict[str, dict[str, Any]] = {}
    for names in (headline, search):
        group = comparison.restrict(names)
        low, high = group.interval(confidence)
        p_values = group.p_different() if names else ()
        for index, task in enumerate(group.tasks):
            models = [model for name, model in rows if name == task]
            tasks[task] = {
                "search": config.task(task).needs_query,
                "exclude_bought": config.task(task).exclude_bought,
                "baseline": float(group.baseline[index]),
                "urm": float(group.model[index]),
                "lift": number(group.lift[index]),
                "low": number(low[index]),
                "high": number(high[index]),
                "p_value": float(p_values[index]),
                "examples": int(group.examples[index]),
                "held_out_categories": int(group.categories[index]),
                "recall": {model: float(rows[task, model][f"recall@{k}"]) for model in models},
                "top": {
                    metric: {model: float(rows[task, model][metric]) for model in models}
                    for metric in TOP
                    if metric in table.columns
                },
            }
    return {
        "k": k,
        "seed": config.seed,
        **sum_up(comparison.restrict(headline), confidence),
        "mean_recall": mean_recalls(table[table["task"].isin(headline)], k),
        "best_other": describe_standing(best.restrict(headline), confidence),
        "search": sum_up(comparison.restrict(search), confidence)
        | {"mean_recall": mean_recalls(table[table["task"].isin(search)], k)}
        if search
        else None,
        "tasks": {task.name: tasks[task.name] for task in config.tasks if task.name in tasks},
    }


def sum_up(comparison: Comparison, confidence: float) -> dict[str, Any]:
    """The figures of several tasks together: ratio of means, mean of lifts, tasks won beyond chance."""
    low, high = comparison.ratio_interval(confidence)
    mean_low, mean_high = comparison.mean_interval(confidence)
    return {
        "lift": number(comparison.ratio),
        "lift_low": number(low),
        "lift_high": number(high),
        "mean_lift": number(comparison.mean_lift),
        "mean_lift_low": number(mean_low),
        "mean_lift_high": number(mean_high),
        "tasks_won": int(comparison.won(confidence).sum()),
    }


def describe_standing(best: Comparison, confidence: float) -> dict[str, Any]:
    """How URM stands to another model in the mean over the tasks, as difference and as ratio of means."""
    (low, high), (lift_low, lift_high) = best.difference_interval(confidence), best.ratio_interval(confidence)
    return {
        "model": best.names[1],
        "difference": best.mean_difference,
        "low": number(low),
        "high": number(high),
        "lift": number(best.ratio),
        "lift_low": number(lift_low),
        "lift_high": number(lift_high),
    }


def flatten(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics of `summarise`, with the ceiling, as numbers by name; what is undefined is left out."""
    figures = ("lift", "lift_low", "lift_high", "mean_lift", "mean_lift_low", "mean_lift_high", "tasks_won")
    values = {f"mean_recall.{model}": value for model, value in metrics["mean_recall"].items()}
    values |= {name: metrics[name] for name in figures}
    if metrics["search"] is not None:
        values |= {f"search.mean_recall.{model}": value for model, value in metrics["search"]["mean_recall"].items()}
        values |= {f"search.{name}": metrics["search"][name] for name in figures}
    values |= {f"best_other_{name}": metrics["best_other"][name] for name in ("difference", *figures[:3])}
    values |= {"ceiling": metrics["ceiling"]["mean"], "share_of_ceiling": metrics["ceiling"]["share"]}
    for task, result in metrics["tasks"].items():
        values |= {f"lift.{task}": result["lift"]}
        values |= {f"recall.{task}.{model}": value for model, value in result["recall"].items()}
    return {name: value for name, value in values.items() if value is not None}


def mean_recalls(table: pd.DataFrame, k: int) -> dict[str, float]:
    """Mean over tasks of each model's recall@k."""
    means = table.groupby("model", sort=False)[f"recall@{k}"].mean()
    return {str(model): float(value) for model, value in means.items()}


def find_best_other(means: Mapping[str, float]) -> str:
    """The model with the highest mean recall, URM apart."""
    return max((model for model in means if model != CANDIDATE), key=lambda model: means[model])


def number(value: float) -> float | None:
    """The value, or None where it is not finite, as JSON wants it."""
    return float(value) if math.isfinite(value) else None


def _recall(ranked: Ranked, k: int) -> Any:
    """Recall@k of each example [E]; zero for one without a target."""
    return recall(count_hits(ranked, k), np.maximum(1, ranked.num_targets), k)


def _share(total: float, count: int) -> float:
    return float(total / count) if count else float("nan")
