"""One training made ready: new model, steps, validation."""

from __future__ import annotations

import dataclasses
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import torch

from components.config import RunConfig
from components.items.table import ItemTable
from components.storage import StageRun
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example, Groups
from components.urm.network.build import NewModel
from components.urm.training.steps import NegativeSampler, TrainingSteps
from components.urm.training.train import TrainingSummary, train
from components.urm.training.validation import Validation


def _past_builder(stage: StageRun, new: NewModel) -> BatchBuilder:
    """The builder for training, whose item table knows only what came before the cuts trained on."""
    reader = dataclasses.replace(new.builder.reader, table=ItemTable.open(stage.path("encode", "item_table_past")))
    return BatchBuilder(new.builder.writer, reader, new.description.behaviors, new.description.config.copy_length)


def _train(
    stage: StageRun, new: NewModel, catalogue: pa.Table, training: Groups, validation: Groups, device: str
) -> TrainingSummary:
    config = stage.config
    sampler = NegativeSampler(catalogue, config.urm.num_negatives, config.urm.negative_power)
    item_ids = catalogue["item_id"].to_numpy()
    chosen = _choose(validation, config.urm.validation_contexts, config.seed)
    measure = Validation(chosen, item_ids, new.builder, config.urm, config.evaluation.k)

    def report(step: int, metrics: dict[str, float]) -> None:
        mlflow.log_metrics(metrics, step=step)
        shown = {name: round(metrics[name], 4) for name in _SHOWN if name in metrics}
        if shown:
            stage.report_progress("training URM", step=step, **shown)

    steps = TrainingSteps(training, _past_builder(stage, new), sampler, config)
    new.model.centre_tasks(steps[0])
    return train(
        new.model,
        steps,
        measure,
        config.urm,
        scratch=stage.scratch,
        device=device,
        seed=config.seed,
        report=report,
    )


_SHOWN = ("loss", "recall_loss", "text_loss", "examples_per_second", "validation_recall")


def _choose(groups: Groups, num_contexts: int, seed: int) -> list[Example]:
    """All examples of a random sample of contexts."""
    order = np.random.default_rng(seed).permutation(len(groups))[:num_contexts]
    return [example for place in sorted(order.tolist()) for example in groups[place][1]]


def _parameters(config: RunConfig, new: NewModel, device: str) -> dict[str, Any]:
    return config.urm.model_dump() | {
        "used_modalities": ",".join(new.builder.reader.modalities),
        "k": config.evaluation.k,
        "seed": config.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "parameters": sum(weight.numel() for weight in new.model.parameters()),
    }
