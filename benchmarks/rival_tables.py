"""Tables of docs/results/ about tuned rivals: the trials of `benchmarks.tuning`, and URM beside what they led to.

The trials are kept in benchmarks/trials/*.jsonl, those of an older rival in its folder before_adr34, the comparisons on
test in benchmarks/evaluations/*-tuned-seed*.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from benchmarks.lines import read_lines
from benchmarks.records import (
    DATA_SETS,
    FOLDER,
    Table,
    describe_standing,
    find_behaviour_tasks,
    find_ratio,
    find_tuned_seeds,
    pool_seeds,
    render_pooled,
    show_mean_recall,
)
from components.evaluation.metrics import recall
from components.evaluation.report import markdown, title
from components.evaluation.summary import BASELINE, CANDIDATE

TRIALS = Path(__file__).parent / "trials"
OLDER = "before_adr34"  # trials of a rival that knew some answers
NAMES = {
    "dimension": "width",
    "learning_rate": "rate",
    "weight_decay": "decay",
    "num_negatives": "negatives",
    "negative_power": "power",
    "field_matches": "fields",
    "id_vectors": "ID vectors",
    "id_dropout": "ID dropout",
}


def render_trials(config: str, folder: str = ".") -> str:
    """Every trial of a data set: what it changed, and its validation recall, the best behaviour tasks first."""
    behaviour, rows = find_behaviour_tasks(config), []
    trials = [trial for file in sorted((TRIALS / folder).glob(f"{config}.*.jsonl")) for trial in read_lines(file)]
    tasks = list(trials[0]["validation_recall"]) if trials else []
    for trial in trials:
        recalls = trial["validation_recall"]
        of_behaviour = float(np.mean([recalls[task] for task in behaviour if task in recalls]))
        values = [of_behaviour, *(recalls[task] for task in tasks)]
        cells = [title(trial["model"]), str(trial["trial"]), str(trial["epochs"]), describe(trial["settings"])]
        cells += [f"{value:.3f}".removeprefix("0") for value in values]
        rows.append((of_behaviour, [*cells, f"{trial['seconds']:,.0f}"]))
    rows.sort(key=lambda row: -row[0])
    head = ["model", "trial", "epochs", "settings", "behaviour tasks", *(f"`{task}`" for task in tasks), "seconds"]
    return markdown(head, [cells for _, cells in rows]).replace("---:", "---", 3)


def render_tuned() -> str:
    """URM against tuned rivals on test: the data sets and seeds that have been kept."""
    rows = []
    for config, name in DATA_SETS.items():
        seeds = find_tuned_seeds(config)
        if not seeds:
            continue
        summary = pool_seeds(f"{config}-tuned", seeds)
        for kind, tasks in summary.groups.items():
            comparison = summary.baseline.restrict(tasks)
            ratio = find_ratio(comparison)
            recalls = [show_mean_recall(summary, model, tasks) for model in (CANDIDATE, BASELINE)]
            row = [name, kind, ", ".join(map(str, seeds)), *recalls, ratio.percent, ratio.percent_interval]
            rows.append([*row, describe_standing(comparison)])
    head = ["data set", "tasks", "seeds", "URM", "tuned target attention", "ratio of means", "95 %"]
    return markdown([*head, "ahead / level / behind"], rows)


def render_tuned_tasks(config: str) -> str:
    """Every task of a data set against the tuned rivals; empty where none was kept."""
    seeds = find_tuned_seeds(config)
    return render_pooled(f"{config}-tuned", seeds) if seeds else ""


def render_first(config: str) -> str:
    """The first items of the lists for the next item, mean over the kept seeds; the best at ten first.

    Only models whose records have these cut-offs.
    """
    columns = {"R@5": ("recall", 5), "R@10": ("recall", 10), "N@5": ("ndcg", 5), "N@10": ("ndcg", 10)}
    columns |= {"R@20": ("recall", 20), "R@100": ("recall", 100)}
    parts = []
    for seed in find_tuned_seeds(config):
        path = FOLDER / f"{config}-tuned-seed{seed}" / "evaluate" / "hits.parquet"
        read, wanted = ["model", "k", "hits", "targets", "ndcg"], [("task", "==", "next_item")]
        hits = pq.read_table(path, columns=read, filters=wanted, read_dictionary=["task"]).to_pandas()
        hits["recall"] = recall(hits["hits"], hits["targets"], hits["k"])
        parts.append(hits.groupby(["model", "k"])[["recall", "ndcg"]].mean())
    means = pd.concat(parts).groupby(["model", "k"]).mean().unstack("k")[[*columns.values()]].dropna()
    rows = [
        [title(str(model)), *(f"{value:.4f}".removeprefix("0") for value in row)]
        for model, row in means.sort_values(("recall", 10), ascending=False).iterrows()
        if row.any()
    ]
    return markdown(["model", *columns], rows)


def describe(settings: Mapping[str, Any]) -> str:
    """`width 64, rate 0.02, fields`; a setting that is off is left out."""
    if not settings:
        return "as configured"
    parts = []
    for name, value in settings.items():
        shown = NAMES.get(name, name).replace("_", " ")
        if value is True:
            parts.append(shown)
        elif value:
            parts.append(f"{shown} {value:g}")
    return ", ".join(parts)


TABLES: dict[str, Table] = {
    "results_tuned": render_tuned,
    **{f"first_{config}": partial(render_first, config) for config in DATA_SETS},
    **{f"trials_{config}": partial(render_trials, config) for config in DATA_SETS},
    **{f"older_trials_{config}": partial(render_trials, config, OLDER) for config in ("amazon_toys", "amazon_beauty")},
    **{f"results_{config}_tuned": partial(render_tuned_tasks, config) for config in DATA_SETS},
    "results_cold": partial(render_pooled, "complete_journey-cold", [0]),
}
