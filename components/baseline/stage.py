"""Stage `baseline`: two rules, item-kNN and the target-attention network, with their test predictions.

Everything is fitted on the training split and chosen on the validation split; the test examples are ranked once, at
the end, and nothing here looks at their targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from typing import Any

import mlflow
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset, load_dataset
from components.baseline.files import write_network, write_popularity, write_predictions
from components.baseline.item_knn import ItemKnn, count_pairs, read_baskets, shrunken_cosine
from components.baseline.network import TargetAttention
from components.baseline.ranking import Scorer, choose, mean_recall, rank
from components.baseline.rules import OwnHistory, Popularity
from components.baseline.target_attention import TargetAttentionScorer, build_network
from components.baseline.training import TrainingSummary, train
from components.config import SPLITS
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track

HALF_LIVES_DAYS = (30.0, 90.0, 365.0)  # the rules' few settings, chosen on validation
SHRINKAGES = (1.0, 10.0)


def run(stage: StageRun) -> StageReport:
    """Train and rank; see docs/architecture.md for the outputs."""
    config = stage.config
    if stage.settings.num_threads:
        torch.set_num_threads(stage.settings.num_threads)
    torch.manual_seed(config.seed)
    data = load_dataset(
        catalogue=stage.path("features", "catalogue"),
        items=stage.path("validate", "items"),
        contexts=stage.path("features", "contexts"),
        examples=stage.path("features", "examples"),
        tasks=config.tasks,
    )
    with track(stage):
        mlflow.log_params(config.baseline.model_dump() | {"k": config.evaluation.k})
        log_examples(stage, *SPLITS)
        popularity = Popularity(data)
        scorers: dict[str, Scorer] = {"popularity": popularity, **_fit_rules(stage, data)}
        network, summary = _train_network(stage, data, popularity)
        validation = _validate(scorers, data, config.evaluation.k) | {"target_attention": summary.best_recall}
        scorers["target_attention"] = TargetAttentionScorer(network, Batcher(data, config.baseline.history_length))
        mlflow.log_metrics({f"validation_recall.{name}.mean": recall["mean"] for name, recall in validation.items()})
        mlflow.log_table(_as_table(validation), "validation_recall.json")

        stage.report_progress("ranking the test examples")
        write_predictions(stage.output / "predictions.parquet", scorers, data, config.evaluation.k)
        write_popularity(stage.output / "popularity.parquet", popularity, data)
        write_network(stage.output, network, data)
    return StageReport(
        outputs={
            "id_vectors": "id_vectors",
            "model": "model",
            "popularity": "popularity.parquet",
            "predictions": "predictions.parquet",
        },
        counts={
            "items": len(data.items),
            "train_examples": len(data.examples.rows("train")),
            "test_examples": len(data.examples.rows("test")),
        },
        metrics={"validation_recall": validation, "training": asdict(summary)},
    )


def _fit_rules(stage: StageRun, data: Dataset) -> dict[str, Scorer]:
    """Own history and item-kNN, their settings chosen on validation; the trials are logged."""
    k = stage.config.evaluation.k
    stage.report_progress("counting co-occurrence")
    baskets = read_baskets(stage.path("validate", "events"), data.items.ids, stage.config.features.split)
    similarity = lru_cache(maxsize=1)(partial(shrunken_cosine, count_pairs(baskets)))

    def make_item_knn(shrinkage: float, half_life_days: float) -> ItemKnn:
        return ItemKnn(data, similarity(shrinkage), half_life_days)

    own_grid = [{"half_life_days": days} for days in HALF_LIVES_DAYS]
    knn_grid = [{"shrinkage": shrinkage} | setting for shrinkage in SHRINKAGES for setting in own_grid]
    scorers: dict[str, Scorer] = {}
    for name, make, grid in (
        ("own_history", partial(OwnHistory, data), own_grid),
        ("item_knn", make_item_knn, knn_grid),
    ):
        scorers[name], trials = choose(make, grid, data, k)
        best = trials[0]
        stage.report_progress(f"{name} chosen", **best)
        mlflow.log_params({f"{name}.{key}": value for key, value in best.items() if key != "validation_recall"})
        mlflow.log_table({key: [trial[key] for trial in trials] for key in best}, f"trials/{name}.json")
    return scorers


def _train_network(stage: StageRun, data: Dataset, popularity: Popularity) -> tuple[TargetAttention, TrainingSummary]:
    config = stage.config.baseline
    network = build_network(data, config, popularity.counts)

    def log(step: int, metrics: dict[str, float]) -> None:
        mlflow.log_metrics(metrics, step=step)
        shown = {name: round(value, 4) for name, value in metrics.items() if name.count(".") == 0 or "mean" in name}
        stage.report_progress("training target attention", step=step, **shown)

    summary = train(network, data, config, k=stage.config.evaluation.k, seed=stage.config.seed, log=log)
    mlflow.log_metrics({"seconds": summary.seconds, "best_step": summary.best_step, "steps": summary.steps})
    mlflow.set_tag("stopped_by", summary.stopped_by)
    return network, summary


def _validate(scorers: Mapping[str, Scorer], data: Dataset, k: int) -> dict[str, dict[str, float]]:
    rows = data.examples.rows("validation")
    return {name: mean_recall(rank(scorer, data, rows, k), data, k) for name, scorer in scorers.items()}


def _as_table(recalls: dict[str, dict[str, float]]) -> dict[str, list[Any]]:
    tasks = list(next(iter(recalls.values())))
    return {"task": tasks} | {name: [recall[task] for task in tasks] for name, recall in recalls.items()}
