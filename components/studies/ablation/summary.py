"""Study `ablation_summary`: every variant against the reference on the same validation examples, over all seeds.

The value of a variant is the mean over tasks of its mean recall. Its difference to the reference has a paired
bootstrap interval over users: a drawn user brings the examples of all tasks and seeds, of both models. Spread is
the standard deviation of the value over seeds; with one seed there is none. Slopes of curves and contrasts of two
variants per task have intervals by the same draws.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import structlog

from components.addresses import fetch
from components.evaluation.bootstrap import draw_weights, sum_by_user
from components.exceptions import ConfigError, DataError, MissingInputError
from components.storage import StageReport, StageRun, load_result
from components.studies.ablation.figures import draw_group
from components.studies.ablation.grid import REFERENCE, Grid, variant_dir
from components.tracking import track

DRAWS = 2000
CONFIDENCE = 0.95
EXAMPLE = ["seed", "example_id"]
log = structlog.get_logger()


def summarise(stage: StageRun, grid: Grid, digests: Mapping[str, str]) -> StageReport:
    """Compare the measured variants of a study; writes a table, a Markdown report and one figure per group.

    `digests` has `grid.digest_settings` of each variant's configuration, by variant. Leaves out a variant
    that is not measured with it and with all seeds of the grid, and names it in the report.

    Raises:
        ConfigError: The variants were measured with another configuration, or the reference with other settings.
        MissingInputError: The reference, or every other variant, has not been measured.
    """
    recalls: dict[str, pd.DataFrame] = {}
    missing: list[MissingInputError] = []
    for variant in grid.variants:
        try:
            recalls[variant] = _read(stage, variant, grid.seeds, digests[variant])
        except MissingInputError as error:
            log.warning("left out", reason=str(error))
            missing.append(error)
    if missing and not recalls.keys() > {REFERENCE}:
        raise missing[0]
    rows = [
        {"variant": variant}
        | _describe_trainings(stage, variant, grid.seeds)
        | compare(recalls[variant], recalls[REFERENCE], stage.config.seed)
        for variant in recalls
    ]
    table = pd.DataFrame(rows).set_index("variant", drop=False)
    reference, measured = stage.config.model_dump(), grid.only(recalls)
    slopes = {
        name: fit_slope(recalls, places, stage.config.seed)
        for name, group in measured.groups.items()
        if len(set((places := group.places(reference)).values())) > 1
    }
    contrasts = {
        title: compare_tasks(recalls[variant], recalls[other], stage.config.seed)
        for title, (variant, other) in measured.contrasts.items()
    }
    outputs = {"table": "ablations.csv", "report": "report.md", "figures": "figures"}
    (stage.output / "figures").mkdir()
    with track(stage):
        table.to_csv(stage.output / "ablations.csv", index=False)
        report = render(grid, table, slopes, contrasts, stage.config.name, stage.config.evaluation.k)
        (stage.output / "report.md").write_text(report)
        for name, group in measured.groups.items():
            path = stage.output / "figures" / f"{name}.png"
            draw_group(path, group, table, reference, stage.config.evaluation.k)
            mlflow.log_artifact(str(path))
        mlflow.log_artifact(str(stage.output / "report.md"))
        mlflow.log_table(table.reset_index(drop=True), "ablations.json")
        mlflow.log_metrics({f"recall.{name}": float(value) for name, value in table["recall"].items()})
    metrics = {"variants": rows, "slopes": slopes, "contrasts": contrasts}
    return StageReport(outputs=outputs, counts={"variants": len(rows)}, metrics=metrics)


def compare(variant: pd.DataFrame, reference: pd.DataFrame, seed: int) -> dict[str, Any]:
    """A variant against the reference: columns seed, example_id, user_id, task, recall of both.

    Returns:
        Value of the variant and its spread over seeds (None with one seed), difference to the reference (absolute)
        and its interval, a bootstrap with this seed.

    Raises:
        DataError: They are of different examples, in the seeds that both have and the tasks of the variant.
    """
    paired = _pair(variant, reference)
    by_seed = variant.groupby(["seed", "task"])["recall"].mean().groupby("seed").mean()
    return {
        "recall": float(by_seed.mean()),
        "spread": float(by_seed.std(ddof=1)) if len(by_seed) > 1 else None,
        **_bootstrap(paired.assign(gain=paired["recall"] - paired["recall_reference"]), seed),
        "seeds": len(by_seed),
        "examples": len(paired),
    }


def _pair(variant: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """Rows of both, by example, in the seeds that both have."""
    mine = variant[variant["seed"].isin(reference["seed"])]
    others = reference[reference["seed"].isin(mine["seed"]) & reference["task"].isin(mine["task"])]
    paired = mine.merge(others, on=EXAMPLE, suffixes=("", "_reference"), validate="one_to_one")
    same = [paired[name] == paired[f"{name}_reference"] for name in ("user_id", "task")]
    paired = paired[same[0] & same[1]]
    if not len(paired) == len(mine) == len(others):
        raise DataError(
            "validation examples of a study",
            expected="the same for a variant and what it is compared with",
            got=f"{len(mine):,} and {len(others):,}, of which {len(paired):,} are the same",
            remedy="leave `features` and `tasks` as they are in the variants of one study",
        )
    return paired


def compare_tasks(variant: pd.DataFrame, other: pd.DataFrame, seed: int) -> dict[str, dict[str, Any]]:
    """A variant minus another per task, and in the mean over tasks; columns and intervals are those of `compare`."""
    parts = {str(task): variant[variant["task"] == task] for task in sorted(variant["task"].unique())}
    return {task: compare(part, other, seed) for task, part in (parts | {"mean": variant}).items()}


def fit_slope(recalls: dict[str, pd.DataFrame], places: dict[str, float], seed: int) -> dict[str, Any]:
    """Change of the value per doubling of a number, or per unit where one of them is not positive.

    By least squares over variants, each number once; its interval is that of `compare`, as the slope is a weighted sum
    of the variants' recalls of the same examples. `places` has the numbers by variant, at least two of them distinct.
    """
    names = list({place: name for name, place in places.items()}.values())
    numbers = np.array([places[name] for name in names])
    doubling = bool((numbers > 0).all())
    centred = np.log2(numbers) if doubling else numbers
    centred = centred - centred.mean()
    slopes = recalls[names[0]].assign(gain=0.0)
    for name, weight in zip(names, centred / (centred @ centred), strict=True):
        paired = _pair(slopes, recalls[name])
        slopes = paired[[*EXAMPLE, "user_id", "task", "recall"]].assign(
            gain=paired["gain"] + weight * paired["recall_reference"]
        )
    result = _bootstrap(slopes, seed)
    return {"slope": result["difference"], "low": result["low"], "high": result["high"], "per_doubling": doubling}


def render(
    grid: Grid,
    table: pd.DataFrame,
    slopes: dict[str, dict[str, Any]],
    contrasts: dict[str, dict[str, dict[str, Any]]],
    config: str,
    k: int,
) -> str:
    """The study as Markdown; slopes by group, contrasts by title."""
    reference = table.loc[REFERENCE]
    seeds = f"± {reference['spread']:.4f} over {reference['seeds']} seeds" if reference["seeds"] > 1 else "one seed"
    head = (
        f"{grid.description} Reference `{REFERENCE}`: {reference['recall']:.4f} ({seeds}, "
        f"{reference['seconds']:.0f} s of sft). Differences are absolute, with a "
        f"{100 * CONFIDENCE:.0f} % paired bootstrap interval over users ({DRAWS} draws, seeds pooled)."
    )
    parts = [f"# Ablations of {config}: validation Recall@{k}", head]
    if absent := [variant for variant in grid.variants if variant not in table.index]:
        parts.append(f"Not measured with all seeds and the settings of the grid, and left out: {', '.join(absent)}.")
    if by_clock := list(table.index[table["by_clock"]]):
        parts.append(f"Ended by `urm.max_seconds`, so that the speed of the machine counts: {', '.join(by_clock)}.")
    for name, group in grid.only(list(table.index)).groups.items():
        lines = [
            "| variant | recall | ± seeds | difference | interval | sft seconds |",
            "| --- | ---: | ---: | ---: | ---: | ---: |",
        ]
        for variant in (REFERENCE, *group.variants):
            row = table.loc[variant]
            difference = "" if variant == REFERENCE else f"{row['difference']:+.4f}"
            interval = "" if variant == REFERENCE else f"{row['low']:+.4f} … {row['high']:+.4f}"
            spread = f"{row['spread']:.4f}" if row["seeds"] > 1 else ""
            lines.append(
                f"| {variant} | {row['recall']:.4f} | {spread} | {difference} | {interval} | {row['seconds']:.0f} |"
            )
        parts += [f"## {group.title}", "\n".join(lines)]
        if slope := slopes.get(name):
            per = "doubling" if slope["per_doubling"] else "unit"
            interval = f"{slope['low']:+.5f} … {slope['high']:+.5f}"
            parts.append(f"Slope: {slope['slope']:+.5f} per {per} of `{group.axis}` ({interval}).")
    for title, by_task in contrasts.items():
        lines = ["| task | examples | difference | interval |", "| --- | ---: | ---: | ---: |"]
        lines += [
            f"| {task} | {row['examples']} | {row['difference']:+.4f} | {row['low']:+.4f} … {row['high']:+.4f} |"
            for task, row in by_task.items()
        ]
        parts += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _read(stage: StageRun, variant: str, seeds: Sequence[int], expected: str) -> pd.DataFrame:
    parts = []
    for seed in seeds:
        run_dir = variant_dir(stage.run_dir, variant, seed)
        result = load_result(run_dir, "measure")
        stale = result is not None and result.metrics.get("settings", expected) != expected  # older records do not say
        if result is not None and (result.config != stage.config.name or (stale and variant == REFERENCE)):
            raise ConfigError(
                "ablation summary",
                expected=f"the configuration and the settings with which {run_dir} was measured ({result.config})",
                got=f"{stage.config.name}, or other settings",
                remedy="give the --config and --set of `urm ablation run`",
            )
        if result is None or stale:
            raise MissingInputError(
                "ablation summary",
                expected=f"variant {variant!r} with seed {seed} measured in {run_dir}",
                got="a result of other settings" if stale else "no result",
                remedy=f"run `urm ablation run --variant {variant} --seed {seed}` with the same --grid and --run-dir",
            )
        path = fetch(result.outputs["recalls"], stage.settings.cache_path / "inputs")
        parts.append(pd.read_parquet(path).assign(seed=seed))
    return pd.concat(parts, ignore_index=True)


def _describe_trainings(stage: StageRun, variant: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Mean seconds of `sft`, and whether `urm.max_seconds` ended one before its steps, as a slow machine makes it."""
    found = [load_result(variant_dir(stage.run_dir, variant, seed), "sft") for seed in seeds]
    results = [result for result in found if result is not None]
    summaries = [result.metrics.get("training", {}) for result in results]
    by_clock = any(summary.get("stopped_by") == "time" for summary in summaries)
    if by_clock:
        steps = [summary.get("steps") for summary in summaries]
        log.warning("ended by urm.max_seconds, not by its steps", variant=variant, steps=steps)
    return {"seconds": float(np.mean([result.seconds for result in results])), "by_clock": by_clock}


def _bootstrap(examples: pd.DataFrame, seed: int) -> dict[str, float]:
    """Mean over tasks of the mean gain, with its percentile interval, by drawing users with replacement.

    Columns of the examples: user_id, task, gain.
    """
    users, user_ids = pd.factorize(examples["user_id"])
    tasks, names = pd.factorize(examples["task"])
    shape = (len(user_ids), len(names))
    counts = sum_by_user(shape, users, tasks, np.ones(len(examples)))
    gains = sum_by_user(shape, users, tasks, examples["gain"].to_numpy())
    table = np.hstack([counts, gains])
    sums = np.concatenate([weights @ table for weights in draw_weights(len(table), DRAWS, seed)])
    drawn, gained = np.hsplit(sums, 2)
    draws = (gained / np.where(drawn > 0, drawn, np.nan)).mean(axis=1)
    draws = draws[np.isfinite(draws)]  # one that misses a task would be the mean of others
    tail = (1 - CONFIDENCE) / 2
    return {
        "difference": float((gains.sum(axis=0) / counts.sum(axis=0)).mean()),
        "low": float(np.quantile(draws, tail)),
        "high": float(np.quantile(draws, 1 - tail)),
    }
