"""The claims table of docs/results/: each with figure, 95 % interval, date, record and command."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.ablation_tables import (
    BACKBONE,
    BEAUTY,
    JOURNEY,
    LAYERS,
    LONG,
    NARROW,
    PUBLISHED,
    VECTORS,
    compare_variant,
)
from benchmarks.records import (
    DATA_SETS,
    SEEDS,
    Figure,
    Table,
    find_lifts,
    find_mean_lift,
    find_ratio,
    find_tuned_seeds,
    pool_seeds,
    read_result,
)
from components.evaluation.report import markdown
from components.storage import StageResult
from components.studies.ablation.grid import REFERENCE
from components.studies.ablation.summary import CONFIDENCE

DOCS = "`python -m benchmarks.docs`"
BEFORE = "target attention before ADR 34"


def render_claims() -> str:
    """The claims that a kept record proves, each with its figure."""
    return _render([*_claim_headline(), *_claim_ablations()])


def render_claims_before() -> str:
    """The claims against target attention as it was until ADR 34, for a page in docs/results/notebook."""
    return _render(_claim_before())


def _render(rows: Iterable[list[str]]) -> str:
    return markdown(["claim", "figure", "95 %", "date", "record", "command"], list(rows)).replace("---:", "---")


def _claim_before() -> Iterator[list[str]]:
    """URM against target attention as it was until ADR 34, which was weaker."""
    for config, name in DATA_SETS.items():
        summary = pool_seeds(config, SEEDS)
        record = f"`{config}-seed{{0,1,2}}`"
        command = "`urm compare benchmarks/evaluations/" + record[1:]
        behaviour = summary.baseline.restrict(summary.groups["behaviour tasks"])
        day = _list_days(read_result(f"{config}-seed{seed}", "evaluate") for seed in SEEDS)
        for what, lift, how in (
            (f"behaviour tasks: mean recall over that of {BEFORE}", find_ratio(behaviour), command),
            (f"behaviour tasks: mean lift over {BEFORE}", find_mean_lift(behaviour), command),
            (f"all tasks: mean lift over {BEFORE}", find_mean_lift(summary.baseline), DOCS),
        ):
            yield [f"[{name}, {what}](../quality.md)", lift.percent, lift.percent_interval, day, record, how]
        low, high = summary.baseline.difference_interval(CONFIDENCE)
        gap = Figure(summary.baseline.mean_difference, low, high)
        claim = f"[{name}, all tasks: mean recall, URM minus {BEFORE}](../quality.md)"
        yield [claim, gap.difference, gap.difference_interval, day, record, DOCS]
        if "unseen_category_query" in summary.baseline.tasks:
            lift = find_lifts(summary.baseline)["unseen_category_query"]
            claim = f"[{name}: queries for categories that no training query named, over {BEFORE}](../search.md)"
            yield [claim, lift.percent, lift.percent_interval, day, record, command]


def _claim_headline() -> Iterator[list[str]]:
    """URM against target attention, by group of tasks."""
    for config, name in DATA_SETS.items():
        if seeds := find_tuned_seeds(config):
            which = ",".join(map(str, seeds))
            record = f"{config}-tuned-seed" + (f"{{{which}}}" if len(seeds) > 1 else which)
            summary = pool_seeds(f"{config}-tuned", seeds)
            day = _list_days(read_result(f"{config}-tuned-seed{seed}", "evaluate") for seed in seeds)
            command = f"`urm compare benchmarks/evaluations/{record}`"
            for group, tasks in summary.groups.items():
                lift = find_ratio(summary.baseline.restrict(tasks))
                claim = f"[{name}, {group}: mean recall over that of target attention](rivals.md)"
                yield [claim, lift.percent, lift.percent_interval, day, f"`{record}`", command]


def _claim_ablations() -> Iterator[list[str]]:
    """What parts of URM are worth, on validation."""
    pairs = (
        (BEAUTY, "h_1", REFERENCE, "One user vector instead of four"),
        (BEAUTY, "h_16", REFERENCE, "Sixteen user vectors instead of four"),
        (JOURNEY, "h_16", REFERENCE, "Sixteen user vectors instead of eight"),
        (VECTORS, "h_16", "h_1", "Sixteen user vectors instead of one, longer trainings of two seeds"),
        (
            PUBLISHED,
            "d_64_h_16",
            "d_64_h_1",
            "Sixteen user vectors instead of one, 64 dimensions, no copy path",
        ),
        (BEAUTY, "id_text", "id_only", "Text vectors beside ID vectors"),
        (BEAUTY, "no_words", "id_text", "Brand and category beside these"),
        (BEAUTY, REFERENCE, "no_words", "Words beside these"),
        (BEAUTY, "random_backbone", REFERENCE, "A random backbone instead of the pretrained one"),
        (BEAUTY, "layers_4", REFERENCE, "Four layers of the backbone instead of one"),
        (BEAUTY, "no_copies_h_4", REFERENCE, "No copy path"),
        (BACKBONE, "pretrained_1", "none", "A pretrained layer instead of no language model"),
        (BACKBONE, "random_1", "none", "A random layer instead of no language model"),
        (LAYERS, "pretrained_1", "none", "The same of a pretrained layer in a shorter training"),
        (LAYERS, "pretrained_8", "none", "Eight pretrained layers instead of no language model"),
        (LAYERS, "pretrained_8", "random_8", "Eight pretrained layers instead of random ones"),
        (LONG, "d_64_h_1", "alone_random_1", "A pretrained layer instead of a random one, 64 dimensions, no copy path"),
        (LONG, "d_64_h_16", "d_64_h_1", "Sixteen user vectors instead of one, 64 dimensions, no copy path"),
        (NARROW, "d_256_h_4", "d_256_h_1", "Four user vectors instead of one, 256 dimensions, no copy path"),
        (NARROW, "d_64_h_16", "d_64_h_4", "Sixteen user vectors instead of four, 64 dimensions, no copy path"),
    )
    for study, variant, other, what in pairs:
        change = compare_variant(study, variant, other)
        day = _list_days(read_result(study.folder(variant, seed), "measure") for seed in study.seeds)
        claim = f"[{what}, {DATA_SETS[study.config]}: validation recall](ablations.md)"
        record = f"`{study.config}-{study.name}.{'main' if variant == REFERENCE else variant}.*`"
        one_seed = f" --seed {study.seeds[0]}" if len(study.seeds) == 1 else ""
        command = f"`urm ablation summary --config {study.config}{one_seed}`" if other == REFERENCE else DOCS
        yield [claim, change.difference, change.difference_interval, day, record, command]


def _list_days(results: Iterable[StageResult]) -> str:
    return ", ".join(sorted({f"{result.finished_at:%Y-%m-%d}" for result in results}))


TABLES: dict[str, Table] = {"results_claims": render_claims, "results_claims_before": render_claims_before}
