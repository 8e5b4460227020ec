"""The evaluation for people: a Markdown table and a figure."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from components.config import RunConfig
from components.evaluation.summary import CANDIDATE, TITLES

OTHER_METRICS = (
    "Coverage is the share of the catalogue that stands in at least one list. Popularity bias is the mean popularity "
    "quantile of the recalled items minus that of the targets. Novelty is the mean of -log2 of a recalled item's share "
    "of the training events: bits of surprise."
)
CEILING = (
    "The best recall of a task that any model here reaches, or URM and target attention together, their lists joined "
    "by reciprocal ranks. Where the ensemble is far ahead of both, each knows what the other does not."
)
SEGMENTS = (
    "Mean over the examples of all tasks; by task in segments.parquet. Users are light up to the median number of "
    "distinct items in the test histories. Targets are new without a training event; the head is the fifth of the "
    "catalogue with the most."
)


def render_report(config: RunConfig, metrics: dict[str, Any], table: pd.DataFrame, segments: pd.DataFrame) -> str:
    """Markdown of the report, from what `summary.summarise`, `tabulate` and `tabulate_segments` return."""
    k = config.evaluation.k
    absent = [task.name for task in config.tasks if task.name not in metrics["tasks"]]
    others = table.groupby("model", sort=False).mean(numeric_only=True).drop(columns="examples")
    rows = [[title(str(model)), *(f"{value:.4f}" for value in row)] for model, row in others.iterrows()]
    explanation = (
        f"Full catalogue, one candidate filter for all models. Recall of an example is |top-{k} ∩ targets| / "
        f"min(|targets|, {k}). The lift is relative to target attention; its interval is a paired bootstrap over users "
        f"({config.evaluation.bootstrap_samples} draws), p is two-sided and Holm-corrected over tasks. The mean lift "
        f"is the mean of the tasks' lifts; URM leads in {metrics['tasks_won']} of {len(metrics['tasks'])} tasks."
    )
    parts = [
        f"# Evaluation of {config.name}: Recall@{k}",
        explanation,
        _recall_table(config, metrics),
        describe_best_other(metrics["best_other"], config.evaluation.gate.confidence),
        "## Ceiling",
        CEILING,
        _ceiling_table(metrics["ceiling"]),
        "## Means over tasks",
        OTHER_METRICS,
        markdown(["model", *others.columns], rows),
        "## Segments",
        SEGMENTS,
        _segment_table(segments, [*metrics["mean_recall"]], k),
    ]
    if absent:
        parts.append(f"Without test examples, and so not compared: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def describe_best_other(best: dict[str, Any], confidence: float) -> str:
    """One sentence: how URM stands to the best of the other models in the mean over tasks."""
    if best["low"] > 0:
        stands = "URM is ahead of it"
    elif best["high"] < 0:
        stands = "URM is behind it"
    else:
        stands = "URM ties with it"
    return (
        f"Best of the other models in the mean is {title(best['model'])}. {stands}: the difference in mean recall is "
        f"{best['difference']:+.4f} ({confidence:.0%} interval {best['low']:+.4f} to {best['high']:+.4f})."
    )


def title(model: str) -> str:
    """A model's name for people."""
    return TITLES.get(model, model.replace("_", " "))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _recall_table(config: RunConfig, metrics: dict[str, Any]) -> str:
    models = [*metrics["mean_recall"]]
    percent = round(100 * config.evaluation.gate.confidence)
    head = ["task", "examples", *map(title, models), f"lift of URM [{percent} %]", "p (Holm)"]
    rows = [
        [name, str(task["examples"]), *(f"{task['recall'][model]:.4f}" for model in models), _lift(task),
         f"{task['p_value']:.4f}"]
        for name, task in metrics["tasks"].items()
    ]  # fmt: skip
    mean = {"lift": metrics["mean_lift"], "low": metrics["mean_lift_low"], "high": metrics["mean_lift_high"]}
    means = [f"{metrics['mean_recall'][model]:.4f}" for model in models]
    rows.append(["**mean**", str(sum(task["examples"] for task in metrics["tasks"].values())), *means, _lift(mean), ""])
    return markdown(head, rows)


def _ceiling_table(ceiling: dict[str, Any]) -> str:
    rows = [
        [name, f"{task['recall']:.4f}", title(task["by"]), f"{task['ensemble']:.4f}", f"{task['urm']:.4f}",
         _percent(task["urm"], task["recall"])]
        for name, task in ceiling["tasks"].items()
    ]  # fmt: skip
    urm = sum(task["urm"] for task in ceiling["tasks"].values()) / len(ceiling["tasks"])
    means = [f"{ceiling['mean']:.4f}", "", f"{ceiling['ensemble']:.4f}", f"{urm:.4f}", _percent(urm, ceiling["mean"])]
    rows.append(["**mean**", *means])
    return markdown(["task", "best", "whose", "ensemble", "URM", "share of the best"], rows)


def _percent(value: float, of: float) -> str:
    return f"{100 * value / of:.1f} %" if of > 0 else "undefined"


def _segment_table(segments: pd.DataFrame, models: list[str], k: int) -> str:
    pooled = segments[segments["task"] == "all"]
    recalls = pooled.pivot(index=["segment", "examples"], columns="model", values=f"recall@{k}").reset_index()
    rows = [
        [str(row["segment"]), str(row["examples"]), *(f"{row[model]:.4f}" for model in models)]
        for row in recalls.to_dict("records")
    ]
    return markdown(["segment", "examples", *map(title, models)], rows)


def draw_figure(path: Path, metrics: dict[str, Any], k: int) -> None:
    """Bars of recall per task and model, and under them the lift with its interval."""
    names = list(metrics["tasks"])
    figure = Figure(figsize=(1.6 + 1.15 * len(names), 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=[3, 2], sharex=True)
    models = [*metrics["mean_recall"]]
    width = 0.8 / len(models)
    for position, model in enumerate(models):
        offsets = [index + (position - (len(models) - 1) / 2) * width for index in range(len(names))]
        heights = [metrics["tasks"][name]["recall"][model] for name in names]
        top.bar(offsets, heights, width, label=title(model), color="black" if model == CANDIDATE else f"C{position}")
    top.set_ylabel(f"Recall@{k}")
    top.legend(
        ncols=min(5, len(models)), fontsize="small", frameon=False, loc="upper center", bbox_to_anchor=(0.5, 1.2)
    )
    for index, name in enumerate(names):
        task = metrics["tasks"][name]
        if task["lift"] is not None and task["low"] is not None:
            bottom.plot([index, index], [100 * task["low"], 100 * task["high"]], color="0.4")
            bottom.plot(index, 100 * task["lift"], "o", color="black" if task["lift"] > 0 else "C3")
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
