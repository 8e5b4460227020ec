"""Canonical tables made by hand, handed to the real stage through the real stage contract."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import load_config
from components.schemas.events import EVENTS, ITEMS, QUARANTINE
from components.settings import Settings
from components.stages.validate import run
from components.storage import StageReport, StageResult, StageRun, run_stage
from tests.worlds import CONFIGS
from tests.worlds.tables import event_row, item_row, write, write_days

__all__ = ["bench", "event_factory", "item_factory", "now", "rows_reader"]  # fixtures

NOW = datetime.now(UTC)
Rows = list[dict[str, Any]]


def event(event_id: str = "e", **values: Any) -> dict[str, Any]:
    """A good event of item 1."""
    good = {"behavior": "view", "scenario": "web", "attributes": {"device": "phone"}, "item_id": 1}
    return event_row(event_id, **{"ts": NOW - timedelta(days=1)} | good | values)


def item(item_id: int = 1, **values: Any) -> dict[str, Any]:
    """A good item."""
    return item_row(item_id, **{"title": "Sock", "category": ["Clothes"], "price": 2.5} | values)


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
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def run(self, events: Rows, items: Rows, rejected: Rows = [], **overrides: Any) -> StageResult:  # noqa: B006
        run_dir = str(self.root / f"run-{next(self._numbers)}")
        source = overrides.pop("source", {"kind": "complete_journey"})
        schema = overrides.pop("schema", EVENTS)
        limits = {f"validation.{name}": value for name, value in overrides.items()}
        config = load_config(CONFIGS / "complete_journey.yaml", {"source": source} | limits)

        def ingest(stage: StageRun) -> StageReport:
            write_days(stage.output / "events", events, schema)
            write(stage.output / "items.parquet", ITEMS, items)
            write(stage.output / "rejected.parquet", QUARANTINE, rejected)
            return StageReport({"events": "events", "items": "items.parquet", "rejected": "rejected.parquet"})

        run_stage("ingest", ingest, config=config, run_dir=run_dir, settings=self.settings, force=True)
        return run_stage("validate", run, config=config, run_dir=run_dir, settings=self.settings, force=True)


@pytest.fixture
def bench(tmp_path: Path, settings: Settings) -> Bench:
    """A bench with everything under the test's own folder."""
    return Bench(tmp_path / "runs", settings)


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
