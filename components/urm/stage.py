"""Stage `sft`: train URM, then write the model, the item table it reads, and the vectors of all candidates."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from components.config import RunConfig
from components.items.table import ItemTable, add_modalities
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track
from components.urm.batches import BatchBuilder
from components.urm.build import NewModel, build_model
from components.urm.device import choose_device
from components.urm.examples import Example, NegativeSampler, TrainingSteps, read_examples
from components.urm.files import save_model
from components.urm.inference import UrmRecaller
from components.urm.request import UserContext
from components.urm.train import TrainingSummary, train
from components.urm.validation import Validation

Groups = list[tuple[UserContext, list[Example]]]


def run(stage: StageRun) -> StageReport:
    """Train and write; see docs/architecture.md for the outputs. Of several processes the first one writes."""
    config = stage.config
    if stage.settings.num_threads:
        torch.set_num_threads(stage.settings.num_threads)
    torch.manual_seed(config.seed)
    device = choose_device(stage.settings)
    # The model and the table it reads stay together; unchanged files are links.
    table = add_modalities(stage.path("encode", "item_table"), stage.output / "item_table", [], {})
    catalogue = pq.read_table(stage.path("features", "catalogue"))
    training, validation = _read_groups(stage, "train"), _read_groups(stage, "validation")
    behaviors = sorted({str(name) for context, _ in training for name in context.behaviors})
    stage.report_progress("building the model", train_contexts=len(training))
    new = build_model(config.urm, table, behaviors, stage.settings.cache_path)
    if stage.settings.process > 0:
        _train(stage, new, catalogue, training, validation, device)
        return StageReport()
    with track(stage):
        mlflow.log_params(_parameters(config, new, device))
        log_examples(stage, "train", output="recent_examples")
        log_examples(stage, "validation")
        summary = _train(stage, new, catalogue, training, validation, device)
        mlflow.log_metrics({"seconds": summary.seconds, "steps": summary.steps, "best_step": summary.best_step})
        mlflow.set_tag("stopped_by", summary.stopped_by)
    model = new.model.cpu().eval()
    save_model(stage.output / "model", model, new.builder.writer, new.description)
    num_candidates = _write_candidates(stage.output / "candidates", new, catalogue)
    return StageReport(
        outputs={"model": "model", "item_table": "item_table", "candidates": "candidates"},
        counts={
            "train_examples": sum(len(examples) for _, examples in training),
            "candidates": num_candidates,
            "parameters": sum(weight.numel() for weight in model.parameters()),
        },
        metrics={"training": asdict(summary), "validation_recall": summary.best_recall},
    )


def _past_builder(stage: StageRun, new: NewModel) -> BatchBuilder:
    """The builder for training, whose item table knows only what came before the cuts trained on."""
    reader = dataclasses.replace(new.builder.reader, table=ItemTable.open(stage.path("encode", "item_table_past")))
    return BatchBuilder(new.builder.writer, reader, new.description.behaviors, new.description.config.copy_length)


def _read_groups(stage: StageRun, split: str) -> Groups:
    """Examples by context; of the training split those of the newest cuts, rare items judged by the past."""
    tasks = {task.name: task for task in stage.config.tasks}
    chosen = pc.field("split") == split
    if split == "train":
        chosen &= pc.field("cut_ts") >= pc.scalar(stage.config.features.split.recent_start)
    contexts = pq.read_table(stage.path("features", "contexts"), filters=chosen)
    examples = pq.read_table(stage.path("features", "recent_examples" if split == "train" else "examples"))
    return read_examples(contexts, examples, tasks, split)


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


def _write_candidates(folder: Path, new: NewModel, catalogue: pa.Table) -> int:
    folder.mkdir()
    item_ids = catalogue["item_id"].to_numpy()
    recaller = UrmRecaller(new.model, new.builder, new.description.config.combine)
    np.save(folder / "keys.npy", item_ids)
    np.save(folder / "vectors.npy", recaller.encode_items(item_ids))
    return len(item_ids)


def _parameters(config: RunConfig, new: NewModel, device: str) -> dict[str, Any]:
    return config.urm.model_dump() | {
        "used_modalities": ",".join(new.builder.reader.modalities),
        "k": config.evaluation.k,
        "seed": config.seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "parameters": sum(weight.numel() for weight in new.model.parameters()),
    }
