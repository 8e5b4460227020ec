"""Rows of the tables that travel between stages, with defaults for what a test does not care about, and results."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from components.addresses import write_json
from components.schemas.events import EVENTS
from components.schemas.examples import CATALOGUE
from components.storage import StageResult

CUT = datetime(2017, 9, 4, 5, tzinfo=UTC)
Row = dict[str, Any]


def write(path: Path, schema: pa.Schema | None, rows: Iterable[Row]) -> Path:
    """Write rows as a Parquet file; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), path)
    return path


def put(run_dir: Path, stage: str, outputs: Mapping[str, Path] | None = None, **fields: Any) -> StageResult:
    """Let a stage have succeeded with these outputs."""
    values = {
        "config": "complete_journey", "fingerprint": stage, "seconds": 1, "started_at": CUT, "finished_at": CUT,
        "outputs": {name: str(path) for name, path in (outputs or {}).items()},
    }  # fmt: skip
    result = StageResult.model_validate({"stage": stage} | values | fields)
    write_json(str(run_dir / stage / "result.json"), result.model_dump(mode="json"))
    return result


def flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Lists of items as one array with offsets."""
    offsets = np.cumsum([0] + [len(row) for row in rows])
    return np.array([item for row in rows for item in row], dtype=np.int64), offsets


def event_row(event_id: object, item_id: int, ts: datetime, **values: Any) -> Row:
    """A purchase of user "u" in a store."""
    event = {"event_id": str(event_id), "user_id": "u", "item_id": item_id, "behavior": "purchase", "ts": ts}
    return event | {"scenario": "store", "query": None, "attributes": {}} | values


def write_days(folder: Path, rows: Sequence[Row], schema: pa.Schema = EVENTS) -> Path:
    """Write events as stages do: a folder per day."""
    folder.mkdir(parents=True)
    days = [f"{row['ts']:%Y-%m-%d}" for row in rows]
    for day in set(days) or {"2017-01-01"}:
        of_day = (row for row, own in zip(rows, days, strict=True) if own == day)
        write(folder / f"date={day}" / "part-0.parquet", schema, of_day)
    return folder


def item_row(item_id: int, **values: Any) -> Row:
    """An item of the category shop."""
    item = {"item_id": item_id, "external_id": str(item_id), "title": f"item {item_id}", "category": ["shop"]}
    return item | {"brand": None, "price": None, "image_uri": None, "created_at": None, "available": True} | values


def catalogue_table(item_ids: Sequence[int], train_events: Sequence[int]) -> pa.Table:
    """A catalogue whose items are the less popular the later they come."""
    quantiles = np.linspace(1, 0, len(item_ids), dtype=np.float32)
    columns = {"item_id": item_ids, "train_events": train_events, "popularity_quantile": quantiles}
    return pa.table(columns, schema=CATALOGUE)


def context_row(number: int, split: str, history: Sequence[int], **values: Any) -> Row:
    """A context of user "u<number>" at CUT: each item of the history purchased once, one day after the other."""
    context = {
        "context_id": number, "user_id": f"u{number}", "cut_ts": CUT, "split": split, "history_item_ids": history,
        "history_counts": [1] * len(history), "history_days_since": [float(day) for day in range(len(history))],
        "history_behaviors": ["purchase"] * len(history), "num_events": len(history), "num_items": len(history),
        "num_active_days": 1, "days_since_last": 1.0, "top_categories": ["milk"],
    }  # fmt: skip
    return context | values


def add_examples(examples: list[Row], context: Row, answers: Mapping[str, Sequence[int]], **values: Any) -> None:
    """Ask tasks of a context; tasks named `…query` search for milk.

    Args:
        examples: Where they are added.
        context: What is asked.
        answers: Task → target items.
        values: What else they have.
    """
    for task, targets in answers.items():
        example = {
            "example_id": len(examples), "context_id": context["context_id"], "split": context["split"], "task": task,
            "query": "milk" if task.endswith("query") else None, "target_item_ids": targets, "target_categories": [],
        }  # fmt: skip
        examples.append(example | values)
