"""The evaluation for people: a Markdown table and a figure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from components.config import RunConfig
from components.evaluation.summary import MODELS

TITLES = {
    "popularity": "popularity",
    "own_history": "own history",
    "item_knn": "item-kNN",
    "target_attention": "target attention",
    "urm": "URM",
}

OTHER_METRICS = (
    "Coverage is the share of the catalogue that stands in somebody's list; popularity bias is the mean popularity "
    "quantile of the recalled items minus that of the targets."
)


def write_report(path: Path, config: RunConfig, metrics: dict[str, Any], table: pd.DataFrame) -> None:
    """Write the report: recall per task and model with lift and interval, then the other metrics."""
    path.write_text(render_report(config, metrics, table))


def render_report(config: RunConfig, metrics: dict[str, Any], table: pd.DataFrame) -> str:
    """Markdown of the report.

    Args:
        config: The run.
        metrics: As `summary.summarise` returns them.
        table: As `summary.tabulate` returns it.
    """
    k, percent = config.evaluation.k, round(100 * config.evaluation.gate.confidence)
    absent = [task.name for task in config.tasks if task.name not in metrics["tasks"]]
    head = ["task", "examples", *TITLES.values(), f"lift of URM [{percent} %]", "p (Holm)"]
    rows = [
        [name, str(task["examples"]), *(f"{task['recall'][model]:.4f}" for model in MODELS), _lift(task),
         f"{task['p_value']:.4f}"]
        for name, task in metrics["tasks"].items()
    ]  # fmt: skip
    mean = {"lift": metrics["mean_lift"], "low": metrics["mean_lift_low"], "high": metrics["mean_lift_high"]}
    means = [f"{metrics['mean_recall'][model]:.4f}" for model in MODELS]
    rows.append(["**mean**", str(sum(task["examples"] for task in metrics["tasks"].values())), *means, _lift(mean), ""])
    others = table.groupby("model", sort=False).mean(numeric_only=True).drop(columns="examples")
    explanation = (
        f"Full catalogue, test weeks, one candidate filter for all models. Recall of an example is "
        f"|top-{k} ∩ targets| / min(|targets|, {k}). The lift is relative to target attention; its interval is a "
        f"paired bootstrap over users ({config.evaluation.bootstrap_samples} draws), p is two-sided and "
        f"Holm-corrected over tasks. The mean lift is the mean of the tasks' lifts; URM leads in "
        f"{metrics['tasks_won']} of {len(metrics['tasks'])} tasks."
    )
    parts = [
        f"# Evaluation of {config.name}: Recall@{k}",
        explanation,
        _markdown(head, rows),
        "## Means over tasks",
        OTHER_METRICS,
        _markdown(
            ["model", *others.columns],
            [[TITLES[str(model)], *(f"{value:.4f}" for value in row)] for model, row in others.iterrows()],
        ),
    ]
    if absent:
        parts.append(f"Without test examples, and so not compared: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def draw_figure(path: Path, metrics: dict[str, Any], k: int) -> None:
    """Bars of recall per task and model, and under them the lift with its interval."""
    names = list(metrics["tasks"])
    figure = Figure(figsize=(1.6 + 1.15 * len(names), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2], sharex=True)
    width = 0.8 / len(MODELS)
    for position, model in enumerate(MODELS):
        offsets = [index + (position - (len(MODELS) - 1) / 2) * width for index in range(len(names))]
        heights = [metrics["tasks"][name]["recall"][model] for name in names]
        top.bar(offsets, heights, width, label=TITLES[model], color=f"C{position}")
    top.set_ylabel(f"Recall@{k}")
    top.legend(ncols=len(MODELS), fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.14))
    for index, name in enumerate(names):
        task = metrics["tasks"][name]
        if task["lift"] is not None and task["low"] is not None:
            bottom.plot([index, index], [100 * task["low"], 100 * task["high"]], color="0.4")
            bottom.plot(index, 100 * task["lift"], "o", color="C4" if task["lift"] > 0 else "C3")
    bottom.axhline(0, color="0.7", linewidth=1)
    bottom.set_ylabel("lift of URM, %")
    bottom.set_xticks(range(len(names)), names, rotation=30, ha="right")
    figure.savefig(path, dpi=120)


def _lift(task: dict[str, Any]) -> str:
    if task["lift"] is None:
        return "undefined (target attention finds nothing)"
    if task["low"] is None:
        return f"{100 * task['lift']:+.1f} %"
    return f"{100 * task['lift']:+.1f} % [{100 * task['low']:+.1f}, {100 * task['high']:+.1f}]"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
