"""Stage `sft`: train URM, then write the model, the item table it reads, and the vectors of all candidates."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import mlflow
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.caches import CachePlace
from components.device import prepare_device
from components.items.calibration import name_by_task
from components.items.table import ItemTable, link_table
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track
from components.urm.data.examples import TRAINING_OUTPUTS, Groups, read_groups
from components.urm.inference import write_candidates
from components.urm.network.files import save_model
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.session import prepare

_SHOWN = ("loss", "recall_loss", "text_loss", "examples_per_second", "validation_recall")


@dataclass(frozen=True)
class SftInputs:
    """What the stage reads."""

    item_table: Path  # folder of the item table for validation and serving
    training_table: ItemTable  # item table for training, see `urm.train_cuts`
    catalogue: pa.Table  # table of schema CATALOGUE
    training_examples: Path  # file of the training examples, for MLflow
    examples: Path  # file of the other examples, for MLflow
    training: Groups  # training examples by context
    validation: Groups  # validation examples by context

    @classmethod
    def read(cls, stage: StageRun) -> SftInputs:
        """Read the outputs of `features` and `encode`."""
        contexts = stage.path("features", "contexts")
        chosen = TRAINING_OUTPUTS[stage.config.urm.train_cuts]
        trained, examples = (stage.path("features", name) for name in (chosen.examples, "examples"))
        return cls(
            item_table=stage.path("encode", "item_table"),
            training_table=ItemTable.open(stage.path("encode", chosen.item_table)),
            catalogue=pq.read_table(stage.path("features", "catalogue")),
            training_examples=trained,
            examples=examples,
            training=read_groups(contexts, trained, stage.config, "train", stage.scratch),
            validation=read_groups(contexts, examples, stage.config, "validation", stage.scratch),
        )


def run(stage: StageRun) -> StageReport:
    """Train and write; see docs/architecture.md for the outputs. Of several processes the first one writes."""
    config = stage.config
    device = prepare_device(stage.settings)
    torch.manual_seed(config.seed)
    inputs = SftInputs.read(stage)
    table = ItemTable.open(inputs.item_table)
    if stage.settings.process == 0:  # the model and the table it reads stay together
        table = link_table(inputs.item_table, stage.output / "item_table")
    stage.report_progress("building the model", train_contexts=len(inputs.training))
    tables = (table, inputs.training_table, inputs.catalogue)
    cache = CachePlace.of(stage.settings)
    session = prepare(config, *tables, inputs.training, inputs.validation, cache=cache, device=device)

    def report(step: int, metrics: dict[str, float]) -> None:
        mlflow.log_metrics(metrics, step=step, synchronous=False)
        shown = {name: round(metrics[name], 4) for name in _SHOWN if name in metrics}
        if shown:
            stage.report_progress("training URM", step=step, **shown)

    checkpoints = Checkpoints(stage.scratch, stage.checkpoints, stage.settings.checkpoint_minutes, stage.is_current)
    sharded = stage.settings.shard_model and stage.settings.processes > 1
    if stage.settings.process > 0:
        session.train(checkpoints, report, sharded=sharded)
        return StageReport()
    with track(stage, resume=True) as tracked:
        # An earlier attempt of this run may have had another device or number of threads: MLflow keeps the first.
        known = tracked.data.params.keys()
        mlflow.log_params({name: value for name, value in session.parameters.items() if name not in known})
        log_examples(inputs.training_examples, config.name, "train")
        log_examples(inputs.examples, config.name, "validation")
        summary = session.train(checkpoints, report, sharded=sharded)
        numbers = {"seconds": summary.seconds, "steps": summary.steps, "best_step": summary.best_step}
        mlflow.log_metrics(numbers, synchronous=False)
        mlflow.set_tag("stopped_by", summary.stopped_by, synchronous=False)
        num_examples = len(session.whole_validation.examples)

        def report_ranked(done: int) -> None:
            stage.report_progress("weighing popularity and ID vectors on validation", done=done, of=num_examples)

        report_ranked(0)
        calibrations = session.calibrate(report_ranked)
        mlflow.log_metrics(name_by_task(calibrations), synchronous=False)
    model = session.new.model.cpu().eval()
    builder = session.new.builder
    encoder = builder.meaning.folder if builder.meaning else None
    save_model(stage.output / "model", model, builder.writer, session.new.description, encoder)
    num_candidates = write_candidates(stage.output / "candidates", session.new, inputs.catalogue)
    return StageReport(
        outputs={"model": "model", "item_table": "item_table", "candidates": "candidates"},
        counts={
            "train_examples": int(inputs.training.num_examples.sum()),
            "candidates": num_candidates,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        },
        metrics={
            "training": asdict(summary),
            "validation_recall": summary.best_recall,
            "calibrated_recall": {task: one.recall for task, one in calibrations.items()},
        },
    )
