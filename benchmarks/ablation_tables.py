"""Tables of docs/results/ from kept variants of ablation studies, and from trainings that differ in their length."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import pandas as pd

from benchmarks.records import (
    CONFIGS,
    FOLDER,
    SEEDS,
    Figure,
    Table,
    order_tasks,
    read_result,
    show_recall,
)
from components.config import load_named_config
from components.evaluation.report import markdown
from components.evaluation.summary import BASELINE
from components.studies.ablation.grid import REFERENCE, load_grid, variant_dir
from components.studies.ablation.summary import compare, fit_slope


@dataclass(frozen=True)
class Study:
    """Kept variants of one ablation study.

    Attributes:
        config: Data set.
        name: Behind the data set in the names of the records.
        reference: What the others are compared with.
        seeds: Of every variant.
        grid: In configs/ablations.
    """

    config: str
    name: str = "ablation"
    reference: str = REFERENCE
    seeds: tuple[int, ...] = SEEDS[:2]
    grid: str = "urm"

    def folder(self, variant: str, seed: int) -> str:
        """Name of a record."""
        return variant_dir(f"{self.config}-{self.name}", variant, seed)

    def kept(self) -> list[str]:
        """Variants that every seed has, in the order of the grid."""
        names = load_grid(self.grid, CONFIGS).variants
        return [name for name in names if all((FOLDER / self.folder(name, seed)).is_dir() for seed in self.seeds)]


BEAUTY, JOURNEY = Study("amazon_beauty"), Study("complete_journey", seeds=SEEDS[:1])
BACKBONE = Study("amazon_beauty", "backbone", reference="none", grid="backbone")
LAYERS = Study("amazon_beauty", "layers", reference="none", grid="backbone")
LONG = Study("amazon_beauty", "long", reference="d_64_h_1", seeds=SEEDS[:1], grid="backbone")
NARROW = Study("amazon_beauty", "narrow", reference="d_64_h_1", seeds=SEEDS[:1], grid="backbone")
PUBLISHED = Study("complete_journey", "published", reference="d_64_h_1", grid="backbone")
VECTORS = Study("complete_journey", "vectors", reference="h_1")
WIDTH = Study("amazon_beauty", "width", reference="d_64_h_1", grid="backbone")

LONGER = {  # trainings of Complete Journey that differ in their length, folders in FOLDER
    "1,200 steps, an earlier commit": "complete_journey-1200-steps.main.seed0",
    "1,200 steps, the 16 newest cuts instead of 8": "complete_journey-16-cuts.main.seed0",
    "3,000 steps": "complete_journey-3000-steps.main.seed0",
    "3,000 steps, seed 1": "complete_journey-3000-steps.main.seed1",
    "1,200 steps, learning rate 1e-3, seed 1": "complete_journey-rate-1e-3.main.seed1",
}


def render_ablations(study: Study) -> str:
    """Every kept variant against the reference, on validation."""
    tasks, seeds = order_tasks(study.config), study.seeds
    rows = []
    for variant in study.kept():
        recalls = read_variant(study, variant)
        by_task = recalls.groupby("task")["recall"].mean()
        by_seed = recalls.groupby(["seed", "task"])["recall"].mean().groupby("seed").mean()
        change = compare_variant(study, variant, study.reference)
        difference = "" if variant == study.reference else f"{change.difference} ({change.difference_interval})"
        seconds = [read_result(study.folder(variant, seed), "sft").seconds for seed in seeds]
        rows.append(
            ["reference" if variant == REFERENCE else variant, show_recall(by_seed.mean(), 4)]
            + ([" / ".join(show_recall(value, 4) for value in by_seed)] if len(seeds) > 1 else [])
            + [difference, *(show_recall(by_task[task]) for task in tasks), f"{sum(seconds) / len(seconds):.0f}"]
        )
    head = ["variant", "recall", *([f"seed {' / '.join(map(str, seeds))}"] if len(seeds) > 1 else [])]
    return markdown([*head, "difference (95 %)", *tasks, "seconds of sft"], rows)


def render_slopes(study: Study) -> str:
    """What a doubling of the number of user vectors changes, by group of the grid with two numbers, on validation."""
    grid = load_grid(study.grid, CONFIGS).only(kept := study.kept())
    config = load_named_config(study.config, CONFIGS).model_dump()
    tasks = order_tasks(study.config)
    rows = []
    for name, group in grid.groups.items():
        if len(places := {variant: place for variant, place in group.places(config).items() if variant in kept}) < 2:
            continue
        recalls = {variant: read_variant(study, variant) for variant in places}
        parts = {"mean": recalls} | {
            task: {variant: of_all[of_all["task"] == task] for variant, of_all in recalls.items()} for task in tasks
        }
        slopes = [fit_slope(part, places, seed=0) for part in parts.values()]
        cells = [Figure(slope["slope"], slope["low"], slope["high"]) for slope in slopes]
        rows.append([f"`{name}`", *(f"{cell.difference} ({cell.difference_interval})" for cell in cells)])
    return markdown(["group", "mean", *tasks], rows)


def render_longer() -> str:
    """Complete Journey, validation: longer trainings of URM, and target attention of one epoch."""
    config = "complete_journey"
    tasks = order_tasks(config)
    rows = []
    for seed in SEEDS:
        recalls = read_result(f"{config}-seed{seed}", "baseline").metrics["validation_recall"][BASELINE]
        rows.append(["target attention, 1 epoch" + (f", seed {seed}" if seed else ""), recalls["mean"], recalls, ""])
    variants = {"300 steps, reference of the ablations": JOURNEY.folder(REFERENCE, 0)} | LONGER
    for name, folder in variants.items():
        measured = read_result(folder, "measure").metrics
        training = read_result(folder, "sft").metrics["training"]
        rows.append([f"URM, {name}", measured["mean_recall"], measured["recall"], f"{training['best_step']:,}"])
    cells = [
        [str(name), show_recall(mean, 4), *(show_recall(recalls[task]) for task in tasks), best]
        for name, mean, recalls, best in rows
    ]
    return markdown(["model", "mean", *tasks, "best step"], cells)


@cache
def read_variant(study: Study, variant: str) -> pd.DataFrame:
    """Recall of each validation example: columns seed, example_id, user_id, task, recall."""
    parts = []
    for seed in study.seeds:
        measured = read_result(study.folder(variant, seed), "measure")
        parts.append(pd.read_parquet(measured.outputs["recalls"]).assign(seed=seed))
    return pd.concat(parts, ignore_index=True)


@cache
def compare_variant(study: Study, variant: str, other: str) -> Figure:
    """Difference in mean recall of a kept variant to another one, paired over users."""
    found = compare(read_variant(study, variant), read_variant(study, other), seed=0)
    return Figure(found["difference"], found["low"], found["high"])


TABLES: dict[str, Table] = {
    "ablations_amazon_beauty": partial(render_ablations, BEAUTY),
    "ablations_amazon_beauty_backbone": partial(render_ablations, BACKBONE),
    "ablations_amazon_beauty_layers": partial(render_ablations, LAYERS),
    "ablations_complete_journey": partial(render_ablations, JOURNEY),
    "ablations_complete_journey_published": partial(render_ablations, PUBLISHED),
    "ablations_complete_journey_vectors": partial(render_ablations, VECTORS),
    "slopes_complete_journey_vectors": partial(render_slopes, VECTORS),
    "ablations_amazon_beauty_long": partial(render_ablations, LONG),
    "ablations_amazon_beauty_narrow": partial(render_ablations, NARROW),
    "ablations_amazon_beauty_width": partial(render_ablations, WIDTH),
    "slopes_amazon_beauty_width": partial(render_slopes, WIDTH),
    "slopes_amazon_beauty_narrow": partial(render_slopes, NARROW),
    "training_complete_journey": render_longer,
}
