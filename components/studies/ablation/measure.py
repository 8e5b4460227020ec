"""Study `measure`: recall of a trained model on all validation examples, one row per example.

The test split is never read: an ablation selects variants, and selection must not see the test.
"""

from collections.abc import Iterator
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from components.device import set_threads
from components.storage import StageReport, StageRun
from components.studies.ablation.grid import digest_settings
from components.studies.finished import load_recaller
from components.tracking import track
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller

EXAMPLES_PER_CHUNK = 512


def run(stage: StageRun) -> StageReport:
    """Recall every validation example; `recalls` has the columns example_id, user_id, task, recall."""
    set_threads(stage.settings)
    with track(stage):
        recaller = load_recaller(lambda output: stage.path("sft", output), stage.settings)
        recalls = pd.DataFrame(_recalls(stage, recaller))
        by_task = {str(task): float(value) for task, value in recalls.groupby("task")["recall"].mean().items()}
        metrics: dict[str, Any] = {
            "mean_recall": float(np.mean(list(by_task.values()))),
            "recall": by_task,
            "settings": digest_settings(stage.config),
        }
        mlflow.log_metrics({f"validation_recall.{task}": value for task, value in by_task.items()})
        mlflow.log_metric("validation_recall", metrics["mean_recall"])
    recalls.to_parquet(stage.output / "recalls.parquet")
    return StageReport(outputs={"recalls": "recalls.parquet"}, counts={"examples": len(recalls)}, metrics=metrics)


def _recalls(stage: StageRun, recaller: UrmRecaller) -> Iterator[dict[str, Any]]:
    config, k = stage.config, stage.config.evaluation.k
    only = [("split", "=", "validation")]
    table = pq.read_table(stage.path("features", "contexts"), filters=only)
    users = dict(zip(table["context_id"].to_pylist(), table["user_id"].to_pylist(), strict=True))
    contexts = read_contexts(table)
    # The tasks of a context are consecutive, so that they share one pass over its history.
    rows = pq.read_table(stage.path("features", "examples"), filters=only).sort_by("context_id").to_pylist()
    for start in range(0, len(rows), EXAMPLES_PER_CHUNK):
        chunk = rows[start : start + EXAMPLES_PER_CHUNK]
        stage.report_progress("recalling validation examples", done=start, of=len(rows))
        requests = [RecallRequest(contexts[row["context_id"]], config.task(row["task"]), row["query"]) for row in chunk]
        for row, items in zip(chunk, recaller.recall(requests, k)[0], strict=True):
            targets = row["target_item_ids"]
            yield {
                "example_id": row["example_id"],
                "user_id": users[row["context_id"]],
                "task": row["task"],
                "recall": float(np.isin(targets, items).sum()) / min(len(targets), k),
            }
