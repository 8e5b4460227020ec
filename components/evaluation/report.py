"""The evaluation for people: a Markdown table and a figure."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from components.config import RunConfig
from components.evaluation.bootstrap import Comparison
from components.evaluation.summary import CANDIDATE, TITLES, name_kind, split_tasks

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

NO_INTERVAL = "too few users for an interval"


def render_report(config: RunConfig, metrics: dict[str, Any], table: pd.DataFrame, segments: pd.DataFrame) -> str:
    """Markdown of the report, from what `summary.summarise`, `tabulate` and `tabulate_segments` return."""
    k, confidence = config.evaluation.k, config.evaluation.gate.confidence
    absent = [task.name for task in config.tasks if task.name not in metrics["tasks"]]
    headline, search = split_tasks(config, metrics["tasks"])
    kind = name_kind(config, headline)
    of_headline = table[table["task"].isin(headline)]
    others = of_headline.groupby("model", sort=False).mean(numeric_only=True).drop(columns="examples")
    rows = [
        [title(str(model)), *("undefined" if math.isnan(value) else f"{value:.4f}" for value in row)]
        for model, row in others.iterrows()
    ]
    explanation = (
        f"Full catalogue, one candidate filter for all models. Recall of an example is |top-{k} ∩ targets| / "
        f"min(|targets|, {k}). A task's lift is relative to target attention; its interval is a paired bootstrap over "
        f"users ({config.evaluation.bootstrap_samples} draws), p is two-sided and Holm-corrected over the tasks of its "
        "table. The lift of the mean is the ratio of the mean recalls, less one; the mean of the tasks' lifts stands "
        "beside it. *History items*: whether items that the user had before the cut may be recalled."
    )
    parts = [
        f"# Evaluation of {config.name}: Recall@{k}",
        f"**{describe_group(metrics, len(headline), kind, confidence)}**",
        explanation,
        f"## {kind.capitalize()}",
        _recall_table({name: metrics["tasks"][name] for name in headline}, metrics, confidence),
        describe_best_other(metrics["best_other"], confidence),
    ]
    if search:
        parts += [
            "## Search tasks",
            "Their queries are made from the targets, so that they are no part of the headline.",
            describe_group(metrics["search"], len(search), "search tasks", confidence),
            _recall_table({name: metrics["tasks"][name] for name in search}, metrics["search"], confidence),
        ]
    held_out = {name: task["held_out_categories"] for name, task in metrics["tasks"].items()}
    parts += [
        f"The interval of {name} draws its held-out categories ({number}) as well as the users."
        for name, number in held_out.items()
        if number
    ]
    parts += [
        "## The top of the lists",
        _top_table(metrics["tasks"]),
        "## Ceiling",
        CEILING,
        _ceiling_table(metrics["ceiling"]),
        f"## Means over {kind}",
        OTHER_METRICS,
        markdown(["model", *others.columns], rows),
        "## Segments",
        SEGMENTS,
        _segment_table(segments, [*metrics["mean_recall"]], k),
    ]
    if metrics["cut_short"]:
        parts.append(f"Trainings that their time limit ended: {', '.join(map(title, metrics['cut_short']))}.")
    if absent:
        parts.append(f"Without test examples, and so not compared: {', '.join(absent)}.")
    return "\n\n".join(parts) + "\n"


def describe_best_other(best: dict[str, Any], confidence: float) -> str:
    """One sentence: how URM stands to the best of the other models in the mean over the headline's tasks."""
    if best["low"] is None or best["high"] is None:
        stands, interval = "How URM stands to it is not known", NO_INTERVAL
    else:
        ahead, behind = best["low"] > 0, best["high"] < 0
        stands = f"URM {'is ahead of' if ahead else 'is behind' if behind else 'ties with'} it"
        interval = f"{confidence:.0%} interval {best['low']:+.4f} to {best['high']:+.4f}"
    return (
        f"Best of the other models in the mean is {title(best['model'])}. {stands}: the difference in mean recall is "
        f"{best['difference']:+.4f} ({interval})."
    )


def describe_group(group: dict[str, Any], num_tasks: int, kind: str, confidence: float) -> str:
    """One sentence on several tasks together, from what `summary.sum_up` returns."""
    if group["lift"] is None:
        return f"{count(num_tasks, kind)}: target attention finds nothing, so that no lift is defined."
    return (
        f"{count(num_tasks, kind)}: lift of the mean recall over target attention {group['lift']:+.1%} "
        f"({describe_interval(group['lift_low'], group['lift_high'], confidence)}); mean of the lifts "
        f"{group['mean_lift']:+.1%}; ahead beyond chance in {group['tasks_won']}."
    )


def describe_lift(comparison: Comparison, confidence: float) -> str:
    """Lift in mean recall with its interval, `+5.0% (95% interval +4.0% to +6.0%)`."""
    low, high = comparison.ratio_interval(confidence)
    if not np.isfinite(comparison.ratio):
        return f"no lift, since {title(comparison.names[1])} finds nothing"
    return f"{comparison.ratio:+.1%} ({describe_interval(low, high, confidence)})"


def describe_interval(low: float | None, high: float | None, confidence: float) -> str:
    """`95% interval +4.0% to +6.0%` of a relative lift; None or NaN is undefined."""
    if low is None or high is None or math.isnan(low):
        return NO_INTERVAL
    return f"{confidence:.0%} interval {low:+.1%} to {high:+.1%}"


def count(number: int, kind: str) -> str:
    """`3 search tasks`, `1 search task`."""
    return f"{number} {kind if number != 1 else kind.removesuffix('s')}"


def title(model: str) -> str:
    """A model's name for people."""
    return TITLES.get(model, model.replace("_", " "))


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _recall_table(tasks: dict[str, Any], group: dict[str, Any], confidence: float) -> str:
    models = [*group["mean_recall"]]
    percent = round(100 * confidence)
    head = ["task", "examples", "history items", *map(title, models), f"lift of URM [{percent} %]", "p (Holm)"]
    rows = [
        [name, str(task["examples"]), "filtered" if task["exclude_bought"] else "kept",
         *(f"{task['recall'][model]:.4f}" for model in models),
         format_lift(task["lift"], task["low"], task["high"]), f"{task['p_value']:.4f}"]
        for name, task in tasks.items()
    ]  # fmt: skip
    means = [f"{group['mean_recall'][model]:.4f}" for model in models]
    examples = str(sum(task["examples"] for task in tasks.values()))
    of_mean, mean_of = (
        format_lift(*(group[f"{name}{end}"] for end in ("", "_low", "_high"))) for name in ("lift", "mean_lift")
    )
    rows.append(["**mean**", examples, "", *means, of_mean, ""])
    rows.append(["mean of the lifts", "", "", *("" for _ in models), mean_of, ""])
    return markdown(head, rows)


def _top_table(tasks: dict[str, Any]) -> str:
    models = list(dict.fromkeys(model for task in tasks.values() for model in task["recall"]))
    rows = [
        [name, metric, *(f"{values[model]:.4f}" for model in models)]
        for name, task in tasks.items()
        for metric, values in task["top"].items()
    ]
    return markdown(["task", "metric", *map(title, models)], rows)


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


def format_lift(lift: float | None, low: float | None, high: float | None) -> str:
    """Relative lift in per cent with its interval; None or NaN is undefined."""
    if lift is None or math.isnan(lift):
        return "undefined (target attention finds nothing)"
    if low is None or high is None or math.isnan(low):
        return f"{100 * lift:+.1f} %"
    return f"{100 * lift:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
