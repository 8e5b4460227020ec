"""URM on the test examples, through the same code that serves it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from components.config import RunConfig
from components.device import choose_device
from components.evaluation.summary import CANDIDATE
from components.schemas.predictions import PREDICTIONS
from components.storage import StageRun
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller

EXAMPLES_PER_CHUNK = 512


def predict_urm(stage: StageRun, examples: pa.Table, contexts: pa.Table, depth: int) -> pa.Table:
    """Rank the whole catalogue for each example.

    Args:
        stage: The evaluation, for its inputs and its progress.
        examples: Rows in the schema EXAMPLES.
        contexts: The contexts they refer to.
        depth: Items wanted an example.

    Returns:
        A table in the schema PREDICTIONS, in the order of the examples sorted by context.
    """
    recaller = UrmRecaller.load(
        stage.path("sft", "model"),
        stage.path("sft", "item_table"),
        stage.path("sft", "candidates"),
        device=choose_device(stage.settings),
    )
    examples = examples.sort_by("context_id")  # a context's tasks share one pass over its history
    requests = build_requests(stage.config, examples, contexts)
    parts = []
    for start in range(0, len(requests), EXAMPLES_PER_CHUNK):
        stage.report_progress("ranking the test examples", done=start, of=len(requests))
        items, scores = recaller.recall(requests[start : start + EXAMPLES_PER_CHUNK], depth)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in items])]).astype(np.int32)
        columns = {
            "example_id": examples.column("example_id").slice(start, len(items)),
            "model": pa.repeat(CANDIDATE, len(items)),
            "item_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(items))),
            "scores": pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(scores))),
        }
        parts.append(pa.table(columns, schema=PREDICTIONS))
    return pa.concat_tables(parts)


def build_requests(config: RunConfig, examples: pa.Table, contexts: pa.Table) -> list[RecallRequest]:
    """One request an example; those of one context share its object."""
    known = read_contexts(contexts)
    columns = (examples.column(name).to_pylist() for name in ("context_id", "task", "query"))
    return [
        RecallRequest(known[context_id], config.task(task), query)
        for context_id, task, query in zip(*columns, strict=True)
    ]
