"""Small logs written as the canonical tables, and run configurations and directories for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from components.addresses import write_json
from components.config import RunConfig
from components.schemas.events import EVENTS, ITEMS
from components.storage import StageResult

START = datetime(2024, 1, 8, 5, tzinfo=UTC)  # first training cut
WEEK = timedelta(days=7)


@dataclass(frozen=True)
class Event:
    """One event; fields that a test does not care about have defaults."""

    user_id: str
    item_id: int
    ts: datetime
    behavior: str = "purchase"
    scenario: str = "store"
    attributes: dict[str, str] = field(default_factory=dict)


def write_events(folder: Path, events: Sequence[Event]) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "event_id": f"e{number:04d}",
            "user_id": event.user_id,
            "item_id": event.item_id,
            "behavior": event.behavior,
            "scenario": event.scenario,
            "query": None,
            "ts": event.ts,
            "attributes": list(event.attributes.items()),
        }
        for number, event in enumerate(events)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=EVENTS), folder / "part.parquet")
    return folder


def write_items(
    path: Path,
    categories: dict[int, list[str]],
    brands: dict[int, str] | None = None,
    titles: dict[int, str] | None = None,
) -> Path:
    rows = [
        {
            "item_id": item_id,
            "external_id": str(item_id),
            "title": (titles or {}).get(item_id, f"item {item_id}"),
            "category": category,
            "brand": (brands or {}).get(item_id),
            "price": None,
            "image_uri": None,
            "created_at": None,
            "available": True,
        }
        for item_id, category in categories.items()
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=ITEMS), path)
    return path


def make_config(tasks: Sequence[dict[str, Any]] | None = None, **features: Any) -> RunConfig:
    """One training cut at START, then one validation and one test cut a week apart."""
    split = {
        "train_start": START,
        "validation_start": START + WEEK,
        "test_start": START + 2 * WEEK,
        "end": START + 3 * WEEK,
    }
    default = [{"name": "next_purchase", "description": "What comes next.", "prompt": "Task: recommend."}]
    return RunConfig.model_validate(
        {
            "name": "small",
            "source": {"kind": "complete_journey"},
            "features": {"split": split, "min_item_events": 1} | features,
            "tasks": default if tasks is None else tasks,
        }
    )


def write_run(run_dir: Path, events: Path, items: Path) -> Path:
    """A run directory in which `validate` has accepted these tables."""
    result = StageResult(
        stage="validate",
        config="small",
        fingerprint=f"{events}",
        outputs={"events": str(events), "items": str(items)},
        seconds=0.0,
        started_at=START,
        finished_at=START,
    )
    write_json(str(run_dir / "validate" / "result.json"), result.model_dump(mode="json"))
    return run_dir
