"""What the demo shows at its end: the comparison, the verdict, the release."""

from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from components.storage import require_json, require_result

# Headings broken so that the table fits 80 columns.
MODELS = {
    "popularity": "popu-\nlarity",
    "own_history": "own\nhistory",
    "item_knn": "item-\nkNN",
    "category_rule": "cate-\ngory\nrule",
    "target_attention": "target\natten-\ntion",
    "urm": "URM",
}


def comparison_table(metrics: dict[str, Any], k: int) -> Table:
    """Task × model of Recall@k, with URM's lift over target attention and its 95 % interval, of evaluate's metrics.

    Behaviour tasks and their mean come first, search tasks with a mean of their own below.
    """
    table = Table(
        title=f"Recall@{k} on the full catalogue, test weeks",
        caption="n: examples; lift: URM against target attention, with its 95 % interval; search tasks stand apart",
        title_justify="left",
        caption_justify="left",
        box=None,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        header_style="bold underline",
    )
    table.add_column("task", no_wrap=True)
    for title in ("n", *MODELS.values(), "lift", "interval"):
        table.add_column(title, justify="right", no_wrap=True, vertical="bottom")
    tasks = metrics["tasks"]
    apart = [name for name in tasks if metrics["search"] and tasks[name]["search"]]
    for group, names in ((metrics, [name for name in tasks if name not in apart]), (metrics["search"], apart)):
        if not names:
            continue
        for name in names:
            task = tasks[name]
            lift = _lift(task["lift"], task["low"], task["high"])
            table.add_row(name, str(task["examples"]), *_recalls(task["recall"]), *lift)
        table.add_section()
        lift = _lift(group["lift"], group["lift_low"], group["lift_high"])
        table.add_row("mean", "", *_recalls(group["mean_recall"]), *lift, end_section=True)
    return table


def print_verdict(console: Console, run_dir: str, promoted_anyway: bool) -> bool:
    """Show what the gate decided and why; returns whether the model passed."""
    verdict = require_json(run_dir, "gate", "verdict")
    passed = bool(verdict["passed"])
    reasons = "\n".join(f"• {reason}" for reason in verdict["reasons"])
    text = f"{verdict['verdict']}\n{reasons}".strip()
    if not passed and promoted_anyway:
        text += (
            "\n\nTHE MODEL DID NOT PASS. It is released below only because this run asked for --promote-anyway, "
            "to show the rest of the chain; the release is tagged as such."
        )
    elif not passed:
        text += "\n\nNothing was released. To see the rest of the chain all the same: urm demo --promote-anyway"
    title = "Gate: passed" if passed else "Gate: NOT PASSED"
    panel = Panel(text, title=title, title_align="left", border_style="green" if passed else "bold red")
    console.print(panel, soft_wrap=False)
    return passed


def print_release(console: Console, run_dir: str) -> None:
    """Show the release that now serves, and the one before it."""
    deployment = require_json(run_dir, "promote", "deployment")
    before = f", before it version {deployment['previous']}" if deployment["previous"] else ""
    crowned = f"alias [bold]champion[/] of version {deployment['version']}{before}"
    served = f"{deployment['outcome']} after {deployment['seconds']:.1f} s"
    console.print(f"[bold]Release[/] {deployment['release']}  {crowned}; {served}", highlight=False)


def print_comparison(console: Console, run_dir: str, k: int) -> None:
    """Show the table of a run."""
    console.print(comparison_table(require_result(run_dir, "evaluate").metrics, k))


def _recalls(recall: dict[str, float]) -> list[str]:
    """Cells of one row, the best in bold; a model without a figure has a dash."""
    known = [recall[model] for model in MODELS if model in recall]
    best = max(known, default=None)
    cells = []
    for model in MODELS:
        if model not in recall:
            cells.append("–")
        else:
            text = f"{recall[model]:.3f}"
            cells.append(f"[bold]{text}[/]" if recall[model] == best else text)
    return cells


def _lift(lift: float | None, low: float | None, high: float | None) -> tuple[str, str]:
    """Cells of a lift and its interval; a dash where target attention finds nothing, or users are too few."""
    interval = "–" if low is None or high is None else f"{low * 100:+.1f}…{high:+.1%}"
    return "–" if lift is None else f"{lift:+.1%}", interval
