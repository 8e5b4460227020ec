"""URM on the test examples, through the same code that serves it."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from components.config import RunConfig
from components.evaluation.summary import CANDIDATE
from components.schemas.predictions import PREDICTIONS
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller

EXAMPLES_PER_CHUNK = 512


def predict_urm(
    recaller: UrmRecaller,
    config: RunConfig,
    examples: pa.Table,
    contexts: pa.Table,
    depth: int,
    report: Callable[..., None],
) -> pa.Table:
    """Rank the whole catalogue for each example, `depth` items each.

    Returns:
        A table in the schema PREDICTIONS, in the order of the examples sorted by context.
    """
    examples = examples.sort_by("context_id")  # a context's tasks share one pass over its history
    requests = build_requests(config, examples, contexts)
    parts = []
    for start in range(0, len(requests), EXAMPLES_PER_CHUNK):
        report("ranking examples", done=start, of=len(requests))
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
    """One request per example; those of one context share its object."""
    known = read_contexts(contexts)
    columns = (examples.column(name).to_pylist() for name in ("context_id", "task", "query"))
    return [
        RecallRequest(known[context_id], config.task(task), query)
        for context_id, task, query in zip(*columns, strict=True)
    ]
