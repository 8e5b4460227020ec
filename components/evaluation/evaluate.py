"""Stage `evaluate`: URM on the test examples, and all five models side by side."""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from components.baseline.schema import PREDICTION_DEPTH
from components.evaluation.bootstrap import compare
from components.evaluation.predict import predict_urm
from components.evaluation.report import draw_figure, write_report
from components.evaluation.schema import HITS
from components.evaluation.summary import (
    BASELINE,
    CANDIDATE,
    MODELS,
    TestExamples,
    cutoffs,
    record_hits,
    summarise,
    tabulate,
)
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track


def run(stage: StageRun) -> StageReport:
    """Rank, measure, compare; see docs/architecture.md for the outputs and the metrics."""
    config = stage.config.evaluation
    if stage.settings.num_threads:
        torch.set_num_threads(stage.settings.num_threads)
    contexts = pq.read_table(stage.path("features", "contexts"))
    examples = _read_test(stage)
    test = TestExamples.build(examples, contexts, pq.read_table(stage.path("features", "catalogue")))
    depth = max(config.k, PREDICTION_DEPTH)
    with track(stage):
        urm = predict_urm(stage, examples, contexts, depth)
        pq.write_table(urm, stage.output / "predictions.parquet", compression="zstd")
        baselines = pq.read_table(stage.path("baseline", "predictions"), columns=["example_id", "model", "item_ids"])
        ranked = {model: test.rank(urm if model == CANDIDATE else baselines, model) for model in MODELS}

        stage.report_progress("comparing the models")
        ks = cutoffs(config.k, depth)
        hits = record_hits(test, ranked, ks)
        pq.write_table(pa.Table.from_pandas(hits, HITS, preserve_index=False), stage.output / "hits.parquet")
        table = tabulate(test, ranked, config.k, ks)
        comparison = compare(
            hits, CANDIDATE, BASELINE, k=config.k, draws=config.bootstrap_samples, seed=stage.config.seed
        )
        metrics = summarise(table, comparison, stage.config)
        write_report(stage.output / "report.md", stage.config, metrics, table)
        draw_figure(stage.output / "figure.png", metrics, config.k)
        _log(stage, table, metrics)
    return StageReport(
        outputs={
            "predictions": "predictions.parquet",
            "hits": "hits.parquet",
            "report": "report.md",
            "figure": "figure.png",
        },
        counts={"examples": len(test.ids), "users": len(set(test.users)), "items": len(test.catalogue)},
        metrics=metrics,
    )


def _read_test(stage: StageRun) -> pa.Table:
    return pq.read_table(stage.path("features", "examples"), filters=pc.field("split") == "test")


def _log(stage: StageRun, table: pd.DataFrame, metrics: dict[str, Any]) -> None:
    mlflow.log_params({"k": stage.config.evaluation.k, "bootstrap_samples": stage.config.evaluation.bootstrap_samples})
    log_examples(stage, "test")
    values = {f"mean_recall.{model}": value for model, value in metrics["mean_recall"].items()}
    values |= {name: metrics[name] for name in ("mean_lift", "mean_lift_low", "mean_lift_high", "tasks_won")}
    for task, result in metrics["tasks"].items():
        values |= {f"lift.{task}": result["lift"]}
        values |= {f"recall.{task}.{model}": value for model, value in result["recall"].items()}
    mlflow.log_metrics({name: value for name, value in values.items() if value is not None})
    mlflow.log_table(table, "metrics.json")
    mlflow.log_artifact(str(stage.output / "figure.png"))
    mlflow.log_artifact(str(stage.output / "report.md"))
