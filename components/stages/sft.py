"""Stage `sft`: train URM, then write the model, the item table it reads, and the vectors of all candidates."""

from __future__ import annotations

from dataclasses import asdict

import mlflow
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from components.device import prepare_device
from components.items.table import add_modalities
from components.storage import StageReport, StageRun
from components.tracking import log_examples, track
from components.urm.data.examples import Groups, read_examples
from components.urm.inference import _write_candidates
from components.urm.network.build import build_model
from components.urm.network.files import save_model
from components.urm.training.session import _parameters, _train


def run(stage: StageRun) -> StageReport:
    """Train and write; see docs/architecture.md for the outputs. Of several processes the first one writes."""
    config = stage.config
    torch.manual_seed(config.seed)
    device = prepare_device(stage.settings)
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
        log_examples(stage.path("features", "recent_examples"), config.name, "train")
        log_examples(stage.path("features", "examples"), config.name, "validation")
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


def _read_groups(stage: StageRun, split: str) -> Groups:
    """Examples by context; of the training split those of the newest cuts, rare items judged by the past."""
    tasks = {task.name: task for task in stage.config.tasks}
    chosen = pc.field("split") == split
    if split == "train":
        chosen &= pc.field("cut_ts") >= pc.scalar(stage.config.features.split.recent_start)
    contexts = pq.read_table(stage.path("features", "contexts"), filters=chosen)
    examples = pq.read_table(stage.path("features", "recent_examples" if split == "train" else "examples"))
    return read_examples(contexts, examples, tasks, split)
