"""Tables of docs/results/ that come from the kept searches of `benchmarks.tuning`, benchmarks/trials/*.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lines import read_lines
from benchmarks.records import DATA_SETS, Table, find_behaviour_tasks
from components.evaluation.report import markdown, title

FOLDER = Path(__file__).parent / "trials"
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


def render_trials(config: str) -> str:
    """Every trial of a data set: what it changed, and its validation recall, the best behaviour tasks first."""
    behaviour, rows = find_behaviour_tasks(config), []
    trials = [trial for file in sorted(FOLDER.glob(f"{config}.*.jsonl")) for trial in read_lines(file)]
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


TABLES: dict[str, Table] = {f"trials_{config}": partial(render_trials, config) for config in DATA_SETS}
