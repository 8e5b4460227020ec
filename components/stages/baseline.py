"""Stage `baseline`: rules, item-kNN, target attention and what else `baseline.models` names, with test predictions.

Everything is fitted on the training split and chosen on the validation split; the test examples are ranked once, at
the end, and nothing here looks at their targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import mlflow
import scipy.sparse as sp
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset, load_dataset
from components.baseline.files import (
    write_network,
    write_popularity,
    write_predictions,
    write_sasrec,
)
from components.baseline.item_knn import ItemKnn
from components.baseline.ranking import Scorer, choose, mean_recall, rank
from components.baseline.rules import OwnHistory, Popularity
from components.baseline.sasrec import SasRecScorer, train_sasrec
from components.baseline.target_attention import TargetAttentionScorer, build_network
from components.baseline.text import Bm25, TextFeatures, TextRetriever, read_text_features
from components.baseline.training import LogFunction, TrainingSummary, train
from components.config import SPLITS
from components.device import set_threads
from components.items.cooccurrence import count_pairs, read_baskets, shrunken_cosine
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track

HALF_LIVES_DAYS = (3.0, 30.0, 90.0, 365.0)  # the rules' few settings, chosen on validation
SHRINKAGES = (1.0, 10.0)
BACKWARD = (1.0, 0.5)
BM25_HISTORY_ITEMS = (1, 3, 10)


@dataclass
class Fitted:
    """What the stage has fitted so far.

    Attributes:
        scorers: The models by name.
        summaries: Of those trained by gradient.
        outputs: Output name -> path, of their files.
    """

    scorers: dict[str, Scorer]
    summaries: dict[str, TrainingSummary] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


def run(stage: StageRun) -> StageReport:
    """Train and rank; see docs/architecture.md for the outputs."""
    config = stage.config
    set_threads(stage.settings)
    data = load_dataset(
        catalogue=stage.path("features", "catalogue"),
        items=stage.path("validate", "items"),
        item_table=stage.path("encode", "item_table"),
        contexts=stage.path("features", "contexts"),
        examples=stage.path("features", "examples"),
        tasks=config.tasks,
    )
    with track(stage):
        _log_parameters(stage)
        log_examples(stage.path("features", "examples"), config.name, *SPLITS)
        popularity = Popularity(data)
        fitted = Fitted({"popularity": popularity})
        _fit_rules(stage, data, fitted)
        _fit_models(stage, data, popularity, fitted)
        validation = _validate(fitted, data, config.evaluation.k)
        mlflow.log_metrics({f"validation_recall.{name}.mean": recall["mean"] for name, recall in validation.items()})
        mlflow.log_table(_as_table(validation), "validation_recall.json")

        stage.report_progress("ranking the test examples")
        write_predictions(stage.output / "predictions.parquet", fitted.scorers, data, config.evaluation.k)
        write_popularity(stage.output / "popularity.parquet", popularity, data)
    return StageReport(
        outputs=fitted.outputs | {"popularity": "popularity.parquet", "predictions": "predictions.parquet"},
        counts={
            "items": len(data.items),
            "train_examples": len(data.examples.rows("train")),
            "test_examples": len(data.examples.rows("test")),
        },
        metrics={
            "validation_recall": validation,
            "training": {name: asdict(summary) for name, summary in fitted.summaries.items()},
        },
    )


def _log_parameters(stage: StageRun) -> None:
    parameters = stage.config.baseline.model_dump()
    sasrec = {f"sasrec.{name}": value for name, value in parameters.pop("sasrec").items()}
    mlflow.log_params(parameters | sasrec | {"k": stage.config.evaluation.k})


def _fit_rules(stage: StageRun, data: Dataset, fitted: Fitted) -> None:
    """Own history and item-kNN."""
    stage.report_progress("counting co-occurrence")
    split = stage.config.features.split
    baskets = read_baskets(stage.path("validate", "events"), data.items.ids, split, until=split.validation_start)
    pairs = lru_cache(maxsize=1)(partial(count_pairs, baskets))

    @lru_cache(maxsize=1)
    def similarity(backward: float, shrinkage: float) -> sp.csr_array:
        return shrunken_cosine(pairs(backward), shrinkage)

    def make_item_knn(backward: float, shrinkage: float, half_life_days: float) -> ItemKnn:
        return ItemKnn(data, similarity(backward, shrinkage), half_life_days)

    own_grid = [{"half_life_days": days} for days in HALF_LIVES_DAYS]
    knn_grid = [
        {"backward": backward, "shrinkage": shrinkage} | setting
        for backward in (BACKWARD if baskets.reach else BACKWARD[:1])
        for shrinkage in SHRINKAGES
        for setting in own_grid
    ]
    fitted.scorers["own_history"] = _choose(stage, data, "own_history", partial(OwnHistory, data), own_grid)
    fitted.scorers["item_knn"] = _choose(stage, data, "item_knn", make_item_knn, knn_grid)


def _fit_models(stage: StageRun, data: Dataset, popularity: Popularity, fitted: Fitted) -> None:
    """Target attention, and the models that the configuration adds."""
    wanted = stage.config.baseline.models
    text = _read_text(stage, data) if {"text", "target_attention_text"} & set(wanted) else None
    if "bm25" in wanted:
        grid = [{"history_items": float(items)} for items in BM25_HISTORY_ITEMS]
        fitted.scorers["bm25"] = _choose(stage, data, "bm25", partial(Bm25, data), grid)
    if "text" in wanted and text is not None:
        grid = [{"half_life_days": days} for days in HALF_LIVES_DAYS]
        fitted.scorers["text"] = _choose(stage, data, "text", partial(TextRetriever, data, text), grid)
    if "sasrec" in wanted:
        _train_sasrec(stage, data, fitted)
    _train_network(stage, data, popularity, fitted, "target_attention", None)
    if "target_attention_text" in wanted:
        _train_network(stage, data, popularity, fitted, "target_attention_text", text)


def _read_text(stage: StageRun, data: Dataset) -> TextFeatures:
    def report(done: int, total: int) -> None:
        stage.report_progress("encoding the queries", done=done, total=total)

    table, cache = stage.path("encode", "item_table"), stage.settings.cache_path / "vectors"
    return read_text_features(data, table, stage.config.items, cache, report)


def _choose(
    stage: StageRun, data: Dataset, name: str, make: Callable[..., Scorer], grid: list[dict[str, float]]
) -> Scorer:
    """A model of few settings, the best of the grid on validation; the trials are logged."""
    scorer, trials = choose(make, grid, data, stage.config.evaluation.k)
    best = trials[0]
    stage.report_progress(f"{name} chosen", **best)
    mlflow.log_params({f"{name}.{key}": value for key, value in best.items() if key != "validation_recall"})
    mlflow.log_table({key: [trial[key] for trial in trials] for key in best}, f"trials/{name}.json")
    return scorer


def _train_sasrec(stage: StageRun, data: Dataset, fitted: Fitted) -> None:
    config, seed = stage.config.baseline, stage.config.seed
    torch.manual_seed(seed)
    model, summary = train_sasrec(data, config, k=stage.config.evaluation.k, seed=seed, log=_logger(stage, "sasrec"))
    _log_summary("sasrec", summary)
    fitted.scorers["sasrec"], fitted.summaries["sasrec"] = SasRecScorer(model, data), summary
    write_sasrec(stage.output / "sasrec", model, config)
    fitted.outputs["sasrec"] = "sasrec"


def _train_network(
    stage: StageRun, data: Dataset, popularity: Popularity, fitted: Fitted, name: str, text: TextFeatures | None
) -> None:
    """The target-attention network, with frozen text vectors or without."""
    config, seed, k = stage.config.baseline, stage.config.seed, stage.config.evaluation.k
    torch.manual_seed(seed)
    network = build_network(data, config, popularity.counts, text.items if text else None)
    batcher = Batcher(data, config.history_length, text.queries if text else None)
    summary = train(network, batcher, config, k=k, seed=seed, log=_logger(stage, name))
    _log_summary(name, summary)
    fitted.scorers[name], fitted.summaries[name] = TargetAttentionScorer(network, batcher), summary
    output = "model" if text is None else name
    write_network(stage.output / output, network, data)
    fitted.outputs[output] = output


def _logger(stage: StageRun, model: str) -> LogFunction:
    """Live curves: those of target attention under plain names, the others' under the model's."""
    prefix = "" if model == "target_attention" else f"{model}."

    def log(step: int, metrics: dict[str, float]) -> None:
        mlflow.log_metrics({f"{prefix}{name}": value for name, value in metrics.items()}, step=step)
        shown = {name: round(value, 4) for name, value in metrics.items() if name.count(".") == 0 or "mean" in name}
        stage.report_progress(f"training {model.replace('_', ' ')}", step=step, **shown)

    return log


def _log_summary(model: str, summary: TrainingSummary) -> None:
    prefix = "" if model == "target_attention" else f"{model}."
    numbers = {"seconds": summary.seconds, "best_step": summary.best_step, "steps": summary.steps}
    mlflow.log_metrics({f"{prefix}{name}": value for name, value in numbers.items()})
    mlflow.set_tag(f"{prefix}stopped_by", summary.stopped_by)


def _validate(fitted: Fitted, data: Dataset, k: int) -> dict[str, dict[str, float]]:
    """Validation recall of every model; those trained by gradient have it from their best step."""
    rows = data.examples.rows("validation")
    recalls: dict[str, dict[str, float]] = {}
    for name, scorer in fitted.scorers.items():
        summary = fitted.summaries.get(name)
        recalls[name] = summary.best_recall if summary else mean_recall(rank(scorer, data, rows, k), data, k)
    return recalls


def _as_table(recalls: Mapping[str, dict[str, float]]) -> dict[str, list[Any]]:
    tasks = list(next(iter(recalls.values())))
    return {"task": tasks} | {name: [recall[task] for task in tasks] for name, recall in recalls.items()}
