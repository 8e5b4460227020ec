"""Draws the figure of the README from the kept records: `python -m benchmarks.figures`."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Drawing

from benchmarks.records import DATA_SETS, REPOSITORY, Figure, find_ratio, find_tuned_seeds, pool_seeds

HEADLINE = REPOSITORY / "docs" / "figures" / "headline.png"
GROUPS = {"behaviour tasks": ("#1f5fa8", 0.14), "search tasks": ("#9aa5b1", -0.14)}  # colour, and how far from the row


def find_lifts(config: str) -> dict[str, Figure]:
    """Lift of URM's mean recall over target attention, by group of tasks; empty where no record is kept."""
    if not (seeds := find_tuned_seeds(config)):
        return {}
    summary = pool_seeds(f"{config}-tuned", seeds)
    return {group: find_ratio(summary.baseline.restrict(tasks)) for group, tasks in summary.groups.items()}


def draw_headline(path: Path = HEADLINE) -> Drawing:
    """One row per data set: lift of URM over target attention by group of tasks, with its 95 % interval."""
    drawing = Drawing(figsize=(8, 2.7), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.add_subplot()
    for row, config in enumerate(reversed(DATA_SETS)):
        for group, lift in find_lifts(config).items():
            colour, shift = GROUPS[group]
            whiskers = [[100 * (lift.value - lift.low)], [100 * (lift.high - lift.value)]]
            axes.errorbar(
                100 * lift.value, row + shift, xerr=whiskers, fmt="o", color=colour,
                label=group if config == next(iter(DATA_SETS)) else None, capsize=3,
            )  # fmt: skip
            end, aside, side = (lift.low, -6, "right") if lift.value < 0 else (lift.high, 6, "left")  # away from zero
            axes.annotate(
                lift.percent, (100 * end, row + shift), (aside, -3.5), ha=side, textcoords="offset points", color=colour
            )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(DATA_SETS)), reversed(DATA_SETS.values()))
    axes.set_ylim(-0.5, len(DATA_SETS) - 0.5)
    axes.set_xlabel("Recall@100 of URM over target attention: lift of the mean, % (95 % interval)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize="small")
    axes.margins(x=0.12)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    drawing.savefig(path, dpi=120)
    return drawing


if __name__ == "__main__":
    draw_headline()
