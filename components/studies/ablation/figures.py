"""One figure per group: a curve where the group varies one number, bars otherwise."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from components.studies.ablation.grid import REFERENCE, Group


def draw_group(path: Path, group: Group, table: pd.DataFrame, reference: dict[str, Any], k: int) -> None:
    """Write a PNG of one group, the reference included where it has a place.

    The table has one row per variant, by name: recall, spread, difference, low, high. `reference` is the configuration
    of the reference, nested; it gives its place on a curve.
    """
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if (axis := group.axis) is not None:
        _curve(axes, axis, group.places(reference), table)
    else:
        _bars(axes, group, table)
    axes.set_title(group.title, fontsize="medium")
    axes.set_ylabel(f"validation Recall@{k}")
    figure.savefig(path, dpi=120)


def _curve(axes: Axes, key: str, places: dict[str, float], table: pd.DataFrame) -> None:
    names = sorted(places, key=lambda name: places[name])
    x = [places[name] for name in names]
    axes.errorbar(x, table.loc[names, "recall"], yerr=_errors(table, names), marker="o", capsize=3)
    if len(x) > 2 and min(x) > 0 and max(x) / min(x) >= 8:
        axes.set_xscale("log", base=2)
    ticks = sorted(set(x))  # a variant may equal the reference
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xlabel(key)


def _bars(axes: Axes, group: Group, table: pd.DataFrame) -> None:
    names = [REFERENCE, *group.variants]
    colors = ["0.6", *(["C0"] * len(group.variants))]
    axes.bar(range(len(names)), table.loc[names, "recall"], yerr=_errors(table, names), color=colors, capsize=3)
    axes.set_xticks(range(len(names)), names, rotation=20, ha="right")


def _errors(table: pd.DataFrame, names: list[str]) -> list[list[float]]:
    """Distances from the value down and up to the interval of the difference to the reference."""
    rows = table.loc[names]
    below = (rows["difference"] - rows["low"]).clip(lower=0)
    above = (rows["high"] - rows["difference"]).clip(lower=0)
    return [below.tolist(), above.tolist()]
