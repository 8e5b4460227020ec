"""Stage `evaluate`: URM on the test examples, beside every model whose predictions the baseline stage left."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import torch

from components.evaluation.bootstrap import compare
from components.evaluation.ceiling import ensemble_recall, find_ceiling, read_lists
from components.evaluation.examples import Measured, TestExamples, measure
from components.evaluation.predict import predict_urm
from components.evaluation.report import draw_figure, write_report
from components.evaluation.summary import (
    BASELINE,
    CANDIDATE,
    cutoffs,
    find_best_other,
    mean_recalls,
    order_models,
    record_hits,
    summarise,
    tabulate,
    tabulate_segments,
)
from components.exceptions import DataError
from components.schemas.hits import HITS
from components.schemas.predictions import PREDICTION_DEPTH
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track


def run(stage: StageRun) -> StageReport:
    """Rank, measure, compare; see docs/architecture.md for the outputs and the metrics."""
    config = stage.config.evaluation
    if stage.settings.num_threads:
        torch.set_num_threads(stage.settings.num_threads)
    contexts = pq.read_table(stage.path("features", "contexts"))
    examples = pq.read_table(stage.path("features", "examples"), filters=pc.field("split") == "test")
    test = TestExamples.build(examples, contexts, pq.read_table(stage.path("features", "catalogue")))
    depth = max(config.k, PREDICTION_DEPTH)
    ks = cutoffs(config.k, depth)
    with track(stage):
        urm = predict_urm(stage, examples, contexts, depth)
        pq.write_table(urm, stage.output / "predictions.parquet", compression="zstd")
        del urm

        stage.report_progress("comparing the models")
        measured = dict(_measure_all(stage, test))
        headline = _write_hits(stage, test, measured, ks)
        table = tabulate(test, measured, config.k, ks)
        segments = tabulate_segments(test, measured, config.k)
        segments.to_parquet(stage.output / "segments.parquet", index=False)
        best = find_best_other(mean_recalls(table, config.k))
        against = {
            other: compare(
                headline, CANDIDATE, other, k=config.k, draws=config.bootstrap_samples, seed=stage.config.seed
            )
            for other in {BASELINE, best}
        }
        together = [read_lists(_predictions(stage, model), model, 2 * config.k) for model in (CANDIDATE, BASELINE)]
        ceiling = find_ceiling(table, ensemble_recall(test, together, config.k), config.k)
        metrics = summarise(table, against[BASELINE], against[best], stage.config) | {"ceiling": ceiling}
        write_report(stage.output / "report.md", stage.config, metrics, table, segments)
        draw_figure(stage.output / "figure.png", metrics, config.k)
        _log(stage, table, segments, metrics)
    return StageReport(
        outputs={
            "predictions": "predictions.parquet",
            "hits": "hits.parquet",
            "segments": "segments.parquet",
            "report": "report.md",
            "figure": "figure.png",
        },
        counts={"examples": len(test.ids), "users": len(set(test.users)), "items": len(test.catalogue)},
        metrics=metrics,
    )


def _measure_all(stage: StageRun, test: TestExamples) -> Iterator[tuple[str, Measured]]:
    """Every model in the order of the tables; the lists of one model at a time are in memory."""
    names = pc.unique(_predictions(stage, BASELINE).to_table(columns=["model"]).column("model")).to_pylist()
    if BASELINE not in names:
        raise DataError(
            "predictions of the baseline stage",
            expected=f"lists of {BASELINE}",
            got=", ".join(names) or "none",
            remedy="run `urm baseline` again",
        )
    for model in order_models([*names, CANDIDATE]):
        lists = _predictions(stage, model).to_table(
            columns=["example_id", "item_ids"], filter=pc.field("model") == model
        )
        yield model, measure(test, lists, model, stage.config.evaluation.k)


def _predictions(stage: StageRun, model: str) -> ds.Dataset:
    """Where a model's lists stand."""
    if model == CANDIDATE:
        return ds.dataset(stage.output / "predictions.parquet")
    return ds.dataset(stage.path("baseline", "predictions"))


def _write_hits(
    stage: StageRun, test: TestExamples, measured: dict[str, Measured], ks: tuple[int, ...]
) -> pd.DataFrame:
    """Write the per-example record model by model; the rows of the headline cut-off are returned."""
    headline: list[pd.DataFrame] = []
    with pq.ParquetWriter(stage.output / "hits.parquet", HITS, compression="zstd") as writer:
        for model, result in measured.items():
            hits = record_hits(test, model, result.ranked, ks)
            writer.write_table(pa.Table.from_pandas(hits, HITS, preserve_index=False))
            headline.append(hits[hits["k"] == stage.config.evaluation.k])
    return pd.concat(headline, ignore_index=True)


def _log(stage: StageRun, table: pd.DataFrame, segments: pd.DataFrame, metrics: dict[str, Any]) -> None:
    mlflow.log_params({"k": stage.config.evaluation.k, "bootstrap_samples": stage.config.evaluation.bootstrap_samples})
    log_examples(stage, "test")
    values = {f"mean_recall.{model}": value for model, value in metrics["mean_recall"].items()}
    values |= {name: metrics[name] for name in ("mean_lift", "mean_lift_low", "mean_lift_high", "tasks_won")}
    values |= {"best_other_difference": metrics["best_other"]["difference"]}
    values |= {"ceiling": metrics["ceiling"]["mean"], "share_of_ceiling": metrics["ceiling"]["share"]}
    for task, result in metrics["tasks"].items():
        values |= {f"lift.{task}": result["lift"]}
        values |= {f"recall.{task}.{model}": value for model, value in result["recall"].items()}
    mlflow.log_metrics({name: value for name, value in values.items() if value is not None})
    mlflow.set_tag("urm.best_other", metrics["best_other"]["model"])
    mlflow.log_table(table, "metrics.json")
    mlflow.log_table(segments, "segments.json")
    mlflow.log_artifact(str(stage.output / "figure.png"))
    mlflow.log_artifact(str(stage.output / "report.md"))
