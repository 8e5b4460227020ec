"""A training session: a new model with the steps and the validation that train it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from components.caches import CachePlace
from components.config import RunConfig
from components.items.calibration import Calibration
from components.items.table import ItemTable
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example, Groups
from components.urm.network.build import NewModel, build_model
from components.urm.training.calibration import calibrate_tasks
from components.urm.training.callbacks import Report
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.popularity import begin_with_popularity
from components.urm.training.steps import NegativeSampler, TrainingSteps
from components.urm.training.train import TrainingSummary, train
from components.urm.training.validation import Validation


@dataclass(frozen=True)
class Session:
    """What `prepare` returns."""

    config: RunConfig
    new: NewModel  # the model and its batch builder, which reads the item table for serving
    steps: TrainingSteps
    validation: Validation  # measures the recall that selects the best checkpoint, on a sample
    whole_validation: Validation  # all validation examples
    device: str  # "cpu" or "cuda"

    @property
    def parameters(self) -> dict[str, Any]:
        """What MLflow shows as the parameters of the training."""
        return self.config.urm.model_dump() | {
            "used_modalities": ",".join(self.new.builder.reader.modalities),
            "k": self.config.evaluation.k,
            "seed": self.config.seed,
            "device": self.device,
            "threads": torch.get_num_threads(),
            "parameters": sum(weight.numel() for weight in self.new.model.parameters()),
        }

    def train(self, checkpoints: Checkpoints, report: Report, *, sharded: bool = False) -> TrainingSummary:
        """Train the model in place, see `train`."""
        return train(
            self.new.model,
            self.steps,
            self.validation,
            self.config.urm,
            checkpoints=checkpoints,
            device=self.device,
            seed=self.config.seed,
            report=report,
            sharded=sharded,
        )

    def calibrate(self, report: Callable[[int], None] | None = None) -> Mapping[str, Calibration]:
        """After `train`, where the whole model is: let each task follow popularity and ID vectors as far as it pays.

        By all validation examples: of a thousand, chance decides for some tasks. `report` is told how many of
        them are ranked.
        """
        model = self.new.model.to(self.device)  # a sharded training has left it on the CPU
        return calibrate_tasks(model, self.whole_validation, report)


def prepare(
    config: RunConfig,
    table: ItemTable,
    training_table: ItemTable,
    catalogue: pa.Table,
    training: Groups,
    validation: Groups,
    *,
    cache: CachePlace,
    device: str,
) -> Session:
    """Build a model and everything that trains it.

    `table` is the item table for validation and serving, `training_table` that for training, see `urm.train_cuts`.
    Examples come by context; a random sample of the validation contexts is measured during the training. `cache` keeps
    packaged backbones as converted.
    """
    behaviors = training.behaviors()
    encoder = (
        config.items.text_encoder if config.urm.query_meaning and any(task.needs_query for task in config.tasks) else ""
    )
    new = build_model(config.urm, table, behaviors, cache, [task.prompt for task in config.tasks], encoder)
    reader = dataclasses.replace(new.builder.reader, table=training_table)
    meaning = new.builder.meaning and new.builder.meaning.without_cache()
    builder = BatchBuilder(new.builder.writer, reader, behaviors, config.urm.copy_length, meaning)
    sampler = NegativeSampler(catalogue, config.urm.num_negatives, config.urm.negative_power)
    steps = TrainingSteps(training, builder, sampler, config)
    new.model.centre_tasks(steps[0])
    begin_with_popularity(new.model, training, builder, sampler.item_ids)
    item_ids = catalogue["item_id"].to_numpy()
    order = np.random.default_rng(config.seed).permutation(len(validation))
    sample, everyone = (
        Validation(_examples_of(validation, places), item_ids, new.builder, config.urm, config.evaluation.k)
        for places in (order[: config.urm.validation_contexts], order)
    )
    return Session(config, new, steps, sample, everyone, device)


def _examples_of(groups: Groups, places: npt.NDArray[np.int64]) -> Sequence[Example]:
    """All examples of some contexts, in the order of the contexts."""
    return [example for place in sorted(places.tolist()) for example in groups[place][1]]
