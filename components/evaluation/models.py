"""Every model on the test examples: measured, recorded, compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from components.config import BaselineConfig, RunConfig
from components.evaluation.bootstrap import compare
from components.evaluation.ceiling import ensemble_recall, find_ceiling, read_lists
from components.evaluation.examples import Measured, TestExamples, measure
from components.evaluation.summary import (
    BASELINE,
    CANDIDATE,
    cutoffs,
    find_best_other,
    mean_recalls,
    order_models,
    record_hits,
    split_tasks,
    summarise,
    tabulate,
    tabulate_segments,
)
from components.exceptions import DataError
from components.schemas.hits import HITS
from components.schemas.predictions import PREDICTION_DEPTH


@dataclass(frozen=True)
class Evaluation:
    """What the models reach."""

    table: pd.DataFrame  # as `summary.tabulate` returns it
    segments: pd.DataFrame  # as `summary.tabulate_segments` returns it
    metrics: dict[str, Any]  # as `summary.summarise` returns them, with the ceiling


def prediction_depth(k: int) -> int:
    """Items per example in a model's lists."""
    return max(k, PREDICTION_DEPTH)


def evaluate_models(
    test: TestExamples,
    predictions: tuple[Path, ...],
    config: RunConfig,
    hits_file: Path,
    cut_short: Sequence[str] = (),
) -> Evaluation:
    """Measure all models and compare URM with the baseline and with the best other one.

    `predictions`, in the schema PREDICTIONS, together hold URM and the baseline; the per-example record goes to
    `hits_file`, in the schema HITS. `cut_short` are models whose training its time limit ended.

    Raises:
        DataError: The baseline has no lists, or a model's lists do not cover the examples.
    """
    lists, k = ds.dataset([str(path) for path in predictions]), config.evaluation.k
    ks = cutoffs(k, prediction_depth(k))
    measured = dict(_measure_all(test, lists, k))
    headline = _write_hits(hits_file, test, measured, k, ks)
    table, segments = tabulate(test, measured, k, ks), tabulate_segments(test, measured, k)
    headline_tasks, _ = split_tasks(config, test.tasks)
    best = find_best_other(mean_recalls(table[table["task"].isin(headline_tasks)], k))
    draws = config.evaluation.bootstrap_samples
    against = {
        other: compare(headline, CANDIDATE, other, k=k, draws=draws, seed=config.seed) for other in {BASELINE, best}
    }
    together = [read_lists(lists, model, 2 * k) for model in (CANDIDATE, BASELINE)]
    ceiling = find_ceiling(table, ensemble_recall(test, together, k), k)
    metrics = summarise(table, against[BASELINE], against[best], config) | {
        "cut_short": [*cut_short],
        "ceiling": ceiling,
        "settings": _digest_settings(config),
    }
    return Evaluation(table, segments, metrics)


def find_cut_short(baseline: Mapping[str, Any]) -> list[str]:
    """Models whose training its time limit ended, by the metrics of the baseline stage."""
    return sorted(model for model, training in baseline["training"].items() if training["stopped_by"] == "time")


def _digest_settings(config: RunConfig) -> str:
    """Digest of that in which runs agree whose seeds are pooled; which rivals there are may differ."""
    rivals = (f"baseline.{name}" for name in BaselineConfig.model_fields if name != "models")
    return config.model_copy(update={"seed": 0}).fingerprint(("features", "items", "tasks", "urm", *rivals))


def _measure_all(test: TestExamples, lists: ds.Dataset, k: int) -> Iterator[tuple[str, Measured]]:
    """Every model in the order of the tables; the lists of one model at a time are in memory."""
    names = pc.unique(lists.to_table(columns=["model"]).column("model")).to_pylist()
    if BASELINE not in names:
        raise DataError(
            "predictions of the baseline stage",
            expected=f"lists of {BASELINE}",
            got=", ".join(name for name in names if name != CANDIDATE) or "none",
            remedy="run `urm baseline` again",
        )
    for model in order_models(names):
        mine = lists.to_table(columns=["example_id", "item_ids"], filter=pc.field("model") == model)
        yield model, measure(test, mine, model, k)


def _write_hits(
    path: Path, test: TestExamples, measured: dict[str, Measured], k: int, ks: tuple[int, ...]
) -> pd.DataFrame:
    """Write the per-example record model by model; the rows of the headline cut-off are returned."""
    headline: list[pd.DataFrame] = []
    with pq.ParquetWriter(path, HITS, compression="zstd") as writer:
        for model, result in measured.items():
            hits = record_hits(test, model, result.ranked, ks)
            writer.write_table(pa.Table.from_pandas(hits, HITS, preserve_index=False))
            headline.append(hits[hits["k"] == k])
    return pd.concat(headline, ignore_index=True)
