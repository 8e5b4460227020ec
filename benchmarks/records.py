"""Tables of docs/results/ that come from the kept records in benchmarks/evaluations.

Seeds of one data set are pooled as `urm compare` pools them: a user drawn by the bootstrap brings the examples of every
seed. A *behaviour task* has no query; the query of a *search task* is made from its target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pandas as pd

from components.config import load_named_config
from components.evaluation.bootstrap import Comparison
from components.evaluation.report import markdown, title
from components.evaluation.summary import BASELINE, CANDIDATE, order_models
from components.exceptions import MissingInputError
from components.storage import StageResult, load_result
from components.studies.ablation.grid import REFERENCE, load_grid, variant_dir
from components.studies.ablation.summary import CONFIDENCE, DRAWS
from components.studies.ablation.summary import compare as compare_variants
from components.studies.comparison import FinishedRun, Summary, read_run, summarise_runs

Table = Callable[[], str]
REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"
FOLDER = Path(__file__).parent / "evaluations"
DATA_SETS = {
    "amazon_beauty": "Amazon Beauty",
    "amazon_sports": "Amazon Sports",
    "amazon_toys": "Amazon Toys",
    "complete_journey": "Complete Journey",
}
SEEDS = (0, 1, 2)
DOCS = "`python -m benchmarks.docs`"
LONGER = {  # trainings of Complete Journey that differ in their length, folders in FOLDER
    "1,200 steps, an earlier commit": "complete_journey-1200-steps.main.seed0",
    "1,200 steps, the 16 newest cuts instead of 8": "complete_journey-16-cuts.main.seed0",
    "3,000 steps": "complete_journey-3000-steps.main.seed0",
    "3,000 steps, seed 1": "complete_journey-3000-steps.main.seed1",
    "1,200 steps, learning rate 1e-3, seed 1": "complete_journey-rate-1e-3.main.seed1",
}


@dataclass(frozen=True)
class Figure:
    """A measured value.

    Attributes:
        value: The value.
        low: Lower end of its interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def percent(self) -> str:
        """`+5.2 %`."""
        return f"{_percent(self.value)} %"

    @property
    def percent_interval(self) -> str:
        """`+4.0 … +6.5`, in per cent."""
        return f"{_percent(self.low)} … {_percent(self.high)}"

    @property
    def difference(self) -> str:
        """`+.0015`."""
        return _difference(self.value)

    @property
    def difference_interval(self) -> str:
        """`−.0009 … +.0040`."""
        return f"{_difference(self.low)} … {_difference(self.high)}"


def render_headline() -> str:
    """All data sets, all tasks beside the behaviour tasks alone."""
    rows = []
    for config, name in DATA_SETS.items():
        summary = pool_seeds(config, SEEDS)
        cells = [_recall(_mean_recall(summary, model)) for model in (CANDIDATE, BASELINE)]
        for comparison in (summary.baseline, restrict(summary.baseline, find_behaviour_tasks(config))):
            lift = find_mean_lift(comparison)
            cells += [f"{lift.percent} ({lift.percent_interval})", _standing(comparison)]
        rows.append([name, *cells])
    standing = "ahead / level / behind"
    lifts = [cell for tasks in ("all tasks", "behaviour tasks") for cell in (f"{tasks}: mean lift (95 %)", standing)]
    return markdown(["data set", "Recall@100: URM", "target attention", *lifts], rows)


def render_pooled(config: str, seeds: Sequence[int] = SEEDS) -> str:
    """Every task of a data set over its seeds: recall per model, lift with interval, lift per seed."""
    summary = pool_seeds(config, tuple(seeds))
    recalls = summary.recalls.groupby(["task", "model"])["recall"]
    means, deviations = recalls.mean(), recalls.std()
    models = [model for model in summary.models if means["mean", model] > 0]
    lifts = find_lifts(summary.baseline)
    counts = dict(zip(summary.baseline.tasks, summary.baseline.examples.tolist(), strict=True))
    runs = [_read_evaluation(config, seed) for seed in seeds]
    rows = []
    for task in (*order_tasks(config), "mean"):
        if task == "mean":
            count, lift = sum(counts.values()), find_mean_lift(summary.baseline)
            by_seed = [run.metrics["mean_lift"] for run in runs]
        else:
            count, lift = counts[task], lifts[task]
            by_seed = [run.metrics["tasks"][task]["lift"] for run in runs]
        spread = [
            f" ± {_recall(deviations[task, model])}" if model in (CANDIDATE, BASELINE) else "" for model in models
        ]
        cells = [_recall(means[task, model]) + more for model, more in zip(models, spread, strict=True)]
        seeds_cell = " / ".join(_percent(value) for value in by_seed)
        rows.append([task, f"{count:,}", *cells, lift.percent, lift.percent_interval, seeds_cell])
    head = ["task", "examples", *map(title, models), "lift", "95 %", f"seed {' / '.join(map(str, seeds))}"]
    return markdown(head, rows)


def render_run(folder: str) -> str:
    """Every task of one kept run: recall per model, lift with interval, p-value after Holm."""
    run = read_run(str(FOLDER / folder))
    metrics = run.metrics
    models = order_models(model for model, value in metrics["mean_recall"].items() if value > 0)
    rows = []
    for task in order_tasks(run.config):
        result = metrics["tasks"][task]
        lift = Figure(result["lift"], result["low"], result["high"])
        recalls = [_recall(result["recall"][model]) for model in models]
        p_value = _recall(result["p_value"])
        rows.append([task, f"{result['examples']:,}", *recalls, lift.percent, lift.percent_interval, p_value])
    lift = Figure(metrics["mean_lift"], metrics["mean_lift_low"], metrics["mean_lift_high"])
    means = [_recall(metrics["mean_recall"][model]) for model in models]
    examples = sum(result["examples"] for result in metrics["tasks"].values())
    rows.append(["mean", f"{examples:,}", *means, lift.percent, lift.percent_interval, ""])
    return markdown(["task", "examples", *map(title, models), "lift", "95 %", "p (Holm)"], rows)


def render_search() -> str:
    """The search tasks of all data sets, with the rivals that read words."""
    rows = []
    models = ("bm25", "text", BASELINE, CANDIDATE)
    for config, name in DATA_SETS.items():
        summary = pool_seeds(config, SEEDS)
        behaviour = find_behaviour_tasks(config)
        means = summary.recalls.groupby(["task", "model"])["recall"].mean()
        lifts = find_lifts(summary.baseline)
        for task in order_tasks(config):
            if task not in behaviour:
                recalls = [_recall(means[task, model]) if (task, model) in means else "" for model in models]
                rows.append([name, task, *recalls, lifts[task].percent, lifts[task].percent_interval])
    return markdown(["data set", "task", *map(title, models), "lift", "95 %"], rows)


def render_trainings() -> str:
    """How the kept headline runs were trained, and what is left above them."""
    rows = []
    for config in DATA_SETS:
        for seed in SEEDS:
            folder = f"{config}-seed{seed}"
            evaluation = _read(folder, "evaluate")
            urm, baseline = (load_result(str(FOLDER / folder), stage) for stage in ("sft", "baseline"))
            cells = [
                *_describe_training(None if urm is None else urm.metrics["training"]),
                *_describe_training(None if baseline is None else baseline.metrics["training"][BASELINE]),
            ]
            ceiling = evaluation.metrics["ceiling"]
            share = f"{100 * ceiling['share']:.1f} %"
            rows.append([folder, f"{evaluation.finished_at:%Y-%m-%d}", *cells, _recall(ceiling["mean"]), share])
    network = ("steps, ended by", "minutes", "validation at step")
    head = [f"{name}: {what}" for name in ("URM", "target attention") for what in network]
    return markdown(["record", "evaluated", *head, "ceiling", "URM's share"], rows)


def render_ablations(config: str, seeds: Sequence[int]) -> str:
    """Every kept variant against the reference, on validation."""
    tasks = order_tasks(config)
    kept = [name for name in load_grid("urm", CONFIGS).variants if _has_variant(config, name, seeds)]
    rows = []
    for variant in kept:
        recalls = read_variant(config, variant, tuple(seeds))
        by_task = recalls.groupby("task")["recall"].mean()
        by_seed = recalls.groupby(["seed", "task"])["recall"].mean().groupby("seed").mean()
        change = compare_variant(config, variant, REFERENCE, tuple(seeds))
        difference = "" if variant == REFERENCE else f"{change.difference} ({change.difference_interval})"
        seconds = [_read(_variant_folder(config, variant, seed), "sft").seconds for seed in seeds]
        rows.append(
            ["reference" if variant == REFERENCE else variant, _recall(by_seed.mean(), 4)]
            + ([" / ".join(_recall(value, 4) for value in by_seed)] if len(seeds) > 1 else [])
            + [difference, *(_recall(by_task[task]) for task in tasks), f"{sum(seconds) / len(seconds):.0f}"]
        )
    head = ["variant", "recall", *([f"seed {' / '.join(map(str, seeds))}"] if len(seeds) > 1 else [])]
    return markdown([*head, "difference (95 %)", *tasks, "seconds of sft"], rows)


def render_longer() -> str:
    """Complete Journey, validation: longer trainings of URM, and target attention of one epoch."""
    config = "complete_journey"
    tasks = order_tasks(config)
    rows = []
    for seed in SEEDS:
        recalls = _read(f"{config}-seed{seed}", "baseline").metrics["validation_recall"][BASELINE]
        rows.append(["target attention, 1 epoch" + (f", seed {seed}" if seed else ""), recalls["mean"], recalls, ""])
    variants = {"300 steps, reference of the ablations": _variant_folder(config, REFERENCE, 0)} | LONGER
    for name, folder in variants.items():
        measured = _read(folder, "measure").metrics
        training = _read(folder, "sft").metrics["training"]
        rows.append([f"URM, {name}", measured["mean_recall"], measured["recall"], f"{training['best_step']:,}"])
    cells = [
        [str(name), _recall(mean, 4), *(_recall(recalls[task]) for task in tasks), best]
        for name, mean, recalls, best in rows
    ]
    return markdown(["model", "mean", *tasks, "best step"], cells)


def render_claims() -> str:
    """The claims that a kept record proves, each with its figure."""
    rows: list[list[str]] = []
    for config, name in DATA_SETS.items():
        summary = pool_seeds(config, SEEDS)
        record = f"`{config}-seed{{0,1,2}}`"
        command = "`urm compare benchmarks/evaluations/" + record[1:]
        behaviour = restrict(summary.baseline, find_behaviour_tasks(config))
        day = _days(_read(f"{config}-seed{seed}", "evaluate") for seed in SEEDS)
        for what, comparison in (("all tasks", summary.baseline), ("behaviour tasks", behaviour)):
            lift = find_mean_lift(comparison)
            claim = f"[{name}, {what}: mean lift over target attention](quality.md)"
            how = command if comparison is summary.baseline else DOCS
            rows.append([claim, lift.percent, lift.percent_interval, day, record, how])
        low, high = summary.baseline.difference_interval(CONFIDENCE)
        gap = Figure(summary.baseline.mean_difference, low, high)
        claim = f"[{name}: mean recall, URM minus target attention](quality.md)"
        rows.append([claim, gap.difference, gap.difference_interval, day, record, command])
        if "unseen_category_query" in summary.baseline.tasks:
            lift = find_lifts(summary.baseline)["unseen_category_query"]
            claim = f"[{name}: queries for categories that no training query named](search.md)"
            rows.append([claim, lift.percent, lift.percent_interval, day, record, command])
    pairs = (
        ("amazon_beauty", "h_1", REFERENCE, "One user vector instead of four"),
        ("amazon_beauty", "h_16", REFERENCE, "Sixteen user vectors instead of four"),
        ("complete_journey", "h_16", REFERENCE, "Sixteen user vectors instead of eight"),
        ("amazon_beauty", "id_text", "id_only", "Text vectors beside ID vectors"),
        ("amazon_beauty", "no_words", "id_text", "Brand and category beside these"),
        ("amazon_beauty", REFERENCE, "no_words", "Words beside these"),
        ("amazon_beauty", "random_backbone", REFERENCE, "A random backbone instead of the pretrained one"),
        ("amazon_beauty", "layers_4", REFERENCE, "Four layers of the backbone instead of one"),
        ("amazon_beauty", "no_copies_h_4", REFERENCE, "No copy path"),
    )
    for config, variant, other, what in pairs:
        seeds = SEEDS[:2] if config == "amazon_beauty" else SEEDS[:1]
        change = compare_variant(config, variant, other, seeds)
        day = _days(_read(_variant_folder(config, variant, seed), "measure") for seed in seeds)
        claim = f"[{what}, {DATA_SETS[config]}: validation recall](ablations.md)"
        record = f"`{config}-ablation.{'main' if variant == REFERENCE else variant}.*`"
        command = f"`urm ablation summary --config {config}`" if other == REFERENCE else DOCS
        rows.append([claim, change.difference, change.difference_interval, day, record, command])
    return markdown(["claim", "figure", "95 %", "date", "record", "command"], rows).replace("---:", "---")


@cache
def pool_seeds(config: str, seeds: tuple[int, ...]) -> Summary:
    """The kept runs of a data set, pooled over their seeds."""
    runs = [_read_evaluation(config, seed) for seed in seeds]
    return summarise_runs(runs, cache=FOLDER, draws=DRAWS)[0]


@cache
def read_variant(config: str, variant: str, seeds: tuple[int, ...]) -> pd.DataFrame:
    """Recall of each validation example: columns seed, example_id, user_id, task, recall."""
    parts = []
    for seed in seeds:
        measured = _read(_variant_folder(config, variant, seed), "measure")
        parts.append(pd.read_parquet(measured.outputs["recalls"]).assign(seed=seed))
    return pd.concat(parts, ignore_index=True)


@cache
def compare_variant(config: str, variant: str, other: str, seeds: tuple[int, ...]) -> Figure:
    """Difference in mean recall of a kept variant to another one, paired over users."""
    found = compare_variants(read_variant(config, variant, seeds), read_variant(config, other, seeds), seed=0)
    return Figure(found["difference"], found["low"], found["high"])


def restrict(comparison: Comparison, tasks: Iterable[str]) -> Comparison:
    """A comparison on some of its tasks; draws of the bootstrap stay the same."""
    wanted = set(tasks)
    places = [place for place, task in enumerate(comparison.tasks) if task in wanted]
    return replace(
        comparison,
        tasks=tuple(comparison.tasks[place] for place in places),
        examples=comparison.examples[places],
        baseline=comparison.baseline[places],
        model=comparison.model[places],
        baseline_draws=comparison.baseline_draws[:, places],
        model_draws=comparison.model_draws[:, places],
    )


def find_behaviour_tasks(config: str) -> tuple[str, ...]:
    """Tasks of a configuration whose examples have no query."""
    return tuple(task.name for task in load_named_config(config, CONFIGS).tasks if not task.target.has_query)


def order_tasks(config: str) -> tuple[str, ...]:
    """Tasks of a configuration in its order."""
    return tuple(task.name for task in load_named_config(config, CONFIGS).tasks)


def find_lifts(comparison: Comparison) -> dict[str, Figure]:
    """Lift of each task over target attention."""
    low, high = comparison.interval(CONFIDENCE)
    values = zip(comparison.lift.tolist(), low.tolist(), high.tolist(), strict=True)
    return {task: Figure(*value) for task, value in zip(comparison.tasks, values, strict=True)}


def find_mean_lift(comparison: Comparison) -> Figure:
    """Mean of the tasks' lifts."""
    return Figure(comparison.mean_lift, *comparison.mean_interval(CONFIDENCE))


def _standing(comparison: Comparison) -> str:
    """Tasks whose interval is above, around and below zero."""
    lifts = find_lifts(comparison).values()
    ahead, behind = sum(lift.low > 0 for lift in lifts), sum(lift.high < 0 for lift in lifts)
    return f"{ahead} / {len(lifts) - ahead - behind} / {behind}"


def _mean_recall(summary: Summary, model: str) -> float:
    rows = summary.recalls[(summary.recalls["task"] == "mean") & (summary.recalls["model"] == model)]
    return float(rows["recall"].mean())


def _read_evaluation(config: str, seed: int) -> FinishedRun:
    return read_run(str(FOLDER / f"{config}-seed{seed}"))


def _read(folder: str, stage: str) -> StageResult:
    result = load_result(str(FOLDER / folder), stage)
    if result is None:
        raise MissingInputError(
            f"record {folder}",
            expected=f"a result of stage {stage!r} in benchmarks/evaluations/{folder}",
            got="none",
            remedy="restore it or keep the run again with `python -m benchmarks.keep`",
        )
    return result


def _variant_folder(config: str, variant: str, seed: int) -> str:
    return variant_dir(f"{config}-ablation", variant, seed)


def _has_variant(config: str, variant: str, seeds: Iterable[int]) -> bool:
    return all((FOLDER / _variant_folder(config, variant, seed)).is_dir() for seed in seeds)


def _describe_training(training: dict[str, Any] | None) -> list[str]:
    """Steps with what ended them, minutes, best validation recall with its step."""
    if training is None:
        return ["not kept"] * 3
    best = training["best_recall"]
    recall = best["mean"] if isinstance(best, dict) else best
    return [
        f"{training['steps']:,}, {training['stopped_by']}",
        f"{training['seconds'] / 60:.1f}",
        f"{_recall(recall, 4)} at {training['best_step']:,}",
    ]


def _days(results: Iterable[StageResult]) -> str:
    return ", ".join(sorted({f"{result.finished_at:%Y-%m-%d}" for result in results}))


def _recall(value: float, digits: int = 3) -> str:
    """`.299`."""
    return f"{value:.{digits}f}".removeprefix("0")


def _percent(value: float) -> str:
    """`+5.2`, in per cent."""
    return f"{100 * value:+.1f}".replace("-", "−")


def _difference(value: float) -> str:
    """`+.0015`."""
    return f"{value:+.4f}".replace("-", "−").replace("0.", ".", 1)


TABLES: dict[str, Table] = {
    "results_headline": render_headline,
    "results_claims": render_claims,
    "results_search": render_search,
    "results_trainings": render_trainings,
    **{f"results_{config}": partial(render_pooled, config) for config in DATA_SETS},
    "results_amazon_toys_two_seeds": partial(render_pooled, "amazon_toys", SEEDS[:2]),
    "ablations_amazon_beauty": partial(render_ablations, "amazon_beauty", SEEDS[:2]),
    "ablations_complete_journey": partial(render_ablations, "complete_journey", SEEDS[:1]),
    "training_complete_journey": render_longer,
    **{
        f"run_{folder}": partial(render_run, folder)
        for folder in (
            "amazon_beauty-seed0",
            "amazon_sports-before-seed0",
            "amazon_sports-seed0",
            "amazon_toys-seed0",
            "amazon_toys-seed1",
        )
    },
}
