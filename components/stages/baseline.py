"""Stage `baseline`: rules, item-kNN, target attention and what else `baseline.models` names, with test predictions.

Everything is fitted on the training split and chosen on the validation split; the test examples are ranked once, at
the end, and nothing here looks at their targets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow

from components.baseline.data import load_dataset
from components.baseline.files import write_popularity, write_predictions
from components.baseline.models import FittedModel, Fitter, ItemTables, validate_models
from components.baseline.rules import Popularity
from components.caches import CachePlace
from components.config import SPLITS, RunConfig
from components.device import set_threads
from components.storage import StageReport, StageRun
from components.tracking import log_examples, log_if_possible, track


@dataclass(frozen=True)
class BaselineInputs:
    """Files of `validate`, `features` and `encode` that the stage reads."""

    items: Path
    events: Path
    catalogue: Path
    contexts: Path
    examples: Path
    tables: ItemTables

    @classmethod
    def read(cls, stage: StageRun) -> BaselineInputs:
        """Take them from the earlier stages."""
        return cls(
            items=stage.path("validate", "items"),
            events=stage.path("validate", "events"),
            catalogue=stage.path("features", "catalogue"),
            contexts=stage.path("features", "contexts"),
            examples=stage.path("features", "examples"),
            tables=ItemTables(stage.path("encode", "item_table"), stage.path("encode", "item_table_past")),
        )


def run(stage: StageRun) -> StageReport:
    """Train and rank; see docs/architecture.md for the outputs."""
    config, inputs, k = stage.config, BaselineInputs.read(stage), stage.config.evaluation.k
    set_threads(stage.settings)
    data = load_dataset(
        inputs.catalogue,
        inputs.items,
        inputs.tables.now,
        inputs.contexts,
        inputs.examples,
        config.tasks,
        stage.scratch,
    )

    def log_curve(model: str, step: int, metrics: dict[str, float]) -> None:
        named = {f"{_prefix(model)}{name}": value for name, value in metrics.items()}
        mlflow.log_metrics(named, step=step, synchronous=False)
        shown = {name: round(value, 4) for name, value in metrics.items() if name.count(".") == 0 or "mean" in name}
        stage.report_progress(f"training {model.replace('_', ' ')}", step=step, **shown)

    with track(stage):
        _log_parameters(config)
        log_examples(inputs.examples, config.name, *SPLITS)
        popularity, models = Popularity(data), []
        fitter = Fitter(data, config, stage.output, stage.scratch, stage.report_progress, log_curve)
        vectors = CachePlace.of(stage.settings) / "vectors"
        for model in fitter.fit(popularity, inputs.events, inputs.tables, vectors):
            _log_model(model)
            models.append(model)
        recalls = validate_models(models, data, k)
        means = {f"validation_recall.{name}.mean": recall["mean"] for name, recall in recalls.items()}
        mlflow.log_metrics(means, synchronous=False)
        tasks = list(recalls["popularity"])
        by_model = {name: [recall[task] for task in tasks] for name, recall in recalls.items()}
        log_if_possible(mlflow.log_table, {"task": tasks} | by_model, "validation_recall.json")

        stage.report_progress("ranking the test examples")
        scorers = {model.name: model.scorer for model in models}
        write_predictions(stage.output / "predictions.parquet", scorers, data, k)
        write_popularity(stage.output / "popularity.parquet", popularity, data)
    files = {"popularity": "popularity.parquet", "predictions": "predictions.parquet"}
    return StageReport(
        outputs={model.output: model.output for model in models if model.output} | files,
        counts={
            "items": len(data.items),
            "train_examples": len(data.examples.rows("train")),
            "test_examples": len(data.examples.rows("test")),
        },
        metrics={
            "validation_recall": recalls,
            "training": {model.name: asdict(model.summary) for model in models if model.summary},
        },
    )


def _log_parameters(config: RunConfig) -> None:
    parameters = config.baseline.model_dump()
    sasrec = {f"sasrec.{name}": value for name, value in parameters.pop("sasrec").items()}
    mlflow.log_params(parameters | sasrec | {"k": config.evaluation.k})


def _log_model(model: FittedModel) -> None:
    for name, trials in model.trials.items():
        if not trials:  # no validation example to choose by
            continue
        best = trials[0]
        chosen = {f"{name}.{key}": value for key, value in best.items() if key != "validation_recall"}
        mlflow.log_params(chosen, synchronous=False)
        table = {key: [trial[key] for trial in trials] for key in best}
        log_if_possible(mlflow.log_table, table, f"trials/{name}.json")
    if summary := model.summary:
        numbers = {"seconds": summary.seconds, "best_step": summary.best_step, "steps": summary.steps}
        named = {f"{_prefix(model.name)}{name}": value for name, value in numbers.items()}
        mlflow.log_metrics(named, synchronous=False)
        mlflow.set_tag(f"{_prefix(model.name)}stopped_by", summary.stopped_by, synchronous=False)


def _prefix(model: str) -> str:
    """Of a model's metrics: those of target attention stand under plain names."""
    return "" if model == "target_attention" else f"{model}."
