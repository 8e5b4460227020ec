"""Canonical tables made by hand, handed to the real stage through the real stage contract."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from components.config import load_config
from components.schemas.events import EVENTS, ITEMS, QUARANTINE
from components.settings import Settings
from components.stages.validate import run
from components.storage import StageReport, StageResult, StageRun, run_stage
from tests.worlds import CONFIGS

__all__ = ["bench", "event_factory", "item_factory", "now", "rows_reader"]  # fixtures

NOW = datetime.now(UTC)
Rows = list[dict[str, Any]]


def event(event_id: str = "e", **values: Any) -> dict[str, Any]:
    """A good event of item 1."""
    good = {
        "event_id": event_id, "user_id": "u", "item_id": 1, "behavior": "view", "scenario": "web",
        "query": None, "ts": NOW - timedelta(days=1), "attributes": {"device": "phone"},
    }  # fmt: skip
    return good | values


def item(item_id: int = 1, **values: Any) -> dict[str, Any]:
    """A good item."""
    good = {
        "item_id": item_id, "external_id": str(item_id), "title": "Sock", "category": ["Clothes"], "brand": None,
        "price": 2.5, "image_uri": None, "created_at": None, "available": True,
    }  # fmt: skip
    return good | values


def read_rows(uri: str) -> Rows:
    """Rows of an events folder or a file, attributes as a dictionary."""
    rows = pa.concat_tables([pq.ParquetFile(path).read() for path in _files(Path(uri))]).to_pylist()
    return [row | ({"attributes": dict(row["attributes"])} if row.get("attributes") else {}) for row in rows]


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*.parquet")) if path.is_dir() else [path]


@dataclass
class Bench:
    """Runs `validate` on given rows, each time in a run directory of its own.

    Attributes:
        root: Folder of the runs; the index of earlier runs lies there too.
        settings: Where it runs.
    """

    root: Path
    settings: Settings
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def run(self, events: Rows, items: Rows, rejected: Rows = [], **overrides: Any) -> StageResult:  # noqa: B006
        run_dir = str(self.root / f"run-{next(self._numbers)}")
        source = overrides.pop("source", {"kind": "complete_journey"})
        schema = overrides.pop("schema", EVENTS)
        limits = {f"validation.{name}": value for name, value in overrides.items()}
        config = load_config(CONFIGS / "complete_journey.yaml", {"source": source} | limits)

        def ingest(stage: StageRun) -> StageReport:
            days = [f"{row['ts']:%Y-%m-%d}" for row in events]
            table = pa.Table.from_pylist(events, schema=schema).append_column("date", pa.array(days, pa.string()))
            partitioning = ds.partitioning(pa.schema([table.schema.field("date")]), flavor="hive")
            (stage.output / "events").mkdir()
            ds.write_dataset(table, stage.output / "events", format="parquet", partitioning=partitioning)
            pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), stage.output / "items.parquet")
            pq.write_table(pa.Table.from_pylist(rejected, schema=QUARANTINE), stage.output / "rejected.parquet")
            return StageReport({"events": "events", "items": "items.parquet", "rejected": "rejected.parquet"})

        run_stage("ingest", ingest, config=config, run_dir=run_dir, settings=self.settings, force=True)
        return run_stage("validate", run, config=config, run_dir=run_dir, settings=self.settings, force=True)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """A bench with everything under the test's own folder."""
    return Bench(tmp_path / "runs", Settings(home=tmp_path / "home", num_threads=1))


@pytest.fixture(name="event")
def event_factory() -> Callable[..., dict[str, Any]]:
    return event


@pytest.fixture(name="item")
def item_factory() -> Callable[..., dict[str, Any]]:
    return item


@pytest.fixture(name="read_rows")
def rows_reader() -> Callable[[str], Rows]:
    return read_rows


@pytest.fixture
def now() -> datetime:
    return NOW
