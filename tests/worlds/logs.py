"""Small logs written as the canonical tables, and run configurations and directories for them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from components.config import RunConfig
from components.schemas.events import EVENTS, ITEMS
from tests.worlds.tables import event_row, item_row, put, write

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
    rows = [event_row(f"e{number:04d}", **vars(event)) for number, event in enumerate(events)]
    return write(folder / "part.parquet", EVENTS, rows).parent


def write_items(path: Path, categories: dict[int, list[str]], brands: dict[int, str] | None = None) -> Path:
    return write(path, ITEMS, (
        item_row(item_id, category=category, brand=(brands or {}).get(item_id))
        for item_id, category in categories.items()
    ))  # fmt: skip


def task(**target: Any) -> dict[str, Any]:
    """A task `wanted` with this filter."""
    return {"name": "wanted", "description": "", "prompt": "", "target": target}


def make_config(tasks: Sequence[dict[str, Any]] | None = None, **features: Any) -> RunConfig:
    """One training cut at START, then one validation and one test cut a week apart."""
    bounds = ("train_start", "validation_start", "test_start", "end")
    split = {name: START + week * WEEK for week, name in enumerate(bounds)}
    default = [{"name": "next_purchase", "description": "What comes next.", "prompt": "Task: recommend."}]
    features = {"split": split, "min_item_events": 1} | features
    values = {"features": features, "tasks": default if tasks is None else tasks}
    return RunConfig.model_validate({"name": "small", "source": {"kind": "complete_journey"}} | values)


def write_run(run_dir: Path, events: Path, items: Path) -> Path:
    """A run directory in which `validate` has accepted these tables."""
    put(run_dir, "validate", {"events": events, "items": items}, config="small", fingerprint=str(events))
    return run_dir
