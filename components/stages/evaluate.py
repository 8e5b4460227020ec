"""Stage `evaluate`: URM on the test examples, beside every model whose predictions the baseline stage left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.config import RunConfig
from components.device import prepare_device
from components.evaluation.examples import TestExamples
from components.evaluation.models import Evaluation, evaluate_models, find_cut_short, prediction_depth
from components.evaluation.predict import predict_urm
from components.evaluation.report import draw_figure, render_report
from components.evaluation.summary import flatten
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track
from components.urm.inference import UrmRecaller

_OUTPUTS = {
    "predictions": "predictions.parquet",
    "hits": "hits.parquet",
    "segments": "segments.parquet",
    "report": "report.md",
    "figure": "figure.png",
}


@dataclass(frozen=True)
class EvaluateInputs:
    """What the stage reads: tables and files of `features`, predictions of `baseline`, the model of `sft`."""

    examples_file: Path
    examples: pa.Table  # of the test split
    contexts: pa.Table
    catalogue: pa.Table
    predictions: Path
    model: Path
    item_table: Path
    candidates: Path

    @classmethod
    def read(cls, stage: StageRun) -> EvaluateInputs:
        """Take them from the earlier stages."""
        examples = stage.path("features", "examples")
        return cls(
            examples_file=examples,
            examples=pq.read_table(examples, filters=pc.field("split") == "test"),
            contexts=pq.read_table(stage.path("features", "contexts")),
            catalogue=pq.read_table(stage.path("features", "catalogue")),
            predictions=stage.path("baseline", "predictions"),
            model=stage.path("sft", "model"),
            item_table=stage.path("sft", "item_table"),
            candidates=stage.path("sft", "candidates"),
        )


def run(stage: StageRun) -> StageReport:
    """Rank, measure, compare; see docs/architecture.md for the outputs and the metrics."""
    config, device, inputs = stage.config, prepare_device(stage.settings), EvaluateInputs.read(stage)
    output = {name: stage.output / file for name, file in _OUTPUTS.items()}
    held_out = [task.name for task in config.tasks if task.target.held_out_query]
    test = TestExamples.build(inputs.examples, inputs.contexts, inputs.catalogue, held_out)
    with track(stage):
        recaller = UrmRecaller.load(inputs.model, inputs.item_table, inputs.candidates, device=device)
        depth = prediction_depth(config.evaluation.k)
        urm = predict_urm(recaller, config, inputs.examples, inputs.contexts, depth, stage.report_progress)
        pq.write_table(urm, output["predictions"], compression="zstd")
        del urm, recaller

        stage.report_progress("comparing the models")
        predictions = (inputs.predictions, output["predictions"])
        cut_short = find_cut_short(stage.inputs["baseline"].metrics)
        evaluation = evaluate_models(test, predictions, config, output["hits"], cut_short)
        evaluation.segments.to_parquet(output["segments"], index=False)
        output["report"].write_text(render_report(config, evaluation.metrics, evaluation.table, evaluation.segments))
        draw_figure(output["figure"], evaluation.metrics, config.evaluation.k)
        log_examples(inputs.examples_file, config.name, "test")
        _log(config, evaluation, output)
    counts = {"examples": len(test.ids), "users": len(set(test.users)), "items": len(test.catalogue)}
    return StageReport(_OUTPUTS, counts, evaluation.metrics)


def _log(config: RunConfig, evaluation: Evaluation, output: dict[str, Path]) -> None:
    mlflow.log_params({"k": config.evaluation.k, "bootstrap_samples": config.evaluation.bootstrap_samples})
    mlflow.log_metrics(flatten(evaluation.metrics))
    mlflow.set_tag("urm.best_other", evaluation.metrics["best_other"]["model"])
    mlflow.log_table(evaluation.table, "metrics.json")
    mlflow.log_table(evaluation.segments, "segments.json")
    for name in ("figure", "report"):
        mlflow.log_artifact(str(output[name]))
