"""Smoke requests as the model is asked them."""

from collections.abc import Sequence
from datetime import datetime

import pyarrow as pa

from components.config import Task
from components.release.bundle import SmokeRequest
from components.schemas.examples import CONTEXTS
from components.urm.data.request import RecallRequest, read_contexts


def to_requests(smoke: Sequence[SmokeRequest], tasks: Sequence[Task]) -> list[RecallRequest]:
    """One request each, in order; those of one context share its object."""
    rows = {row.context["context_id"]: row.context for row in smoke}
    parsed = [{**row, "cut_ts": datetime.fromisoformat(row["cut_ts"])} for row in rows.values()]
    contexts = read_contexts(pa.Table.from_pylist(parsed, schema=CONTEXTS))
    by_name = {task.name: task for task in tasks}
    return [RecallRequest(contexts[row.context["context_id"]], by_name[row.task], row.query) for row in smoke]
