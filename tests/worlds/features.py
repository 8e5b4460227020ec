"""Fixtures of the features tests: an engine, settings, and logs read into the engine."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pytest

from components.config import RunConfig
from components.engines.duckdb import open_engine
from components.features.log import read_log
from components.settings import Settings
from tests.worlds.logs import Event, make_config, write_events

__all__ = ["engine", "logged"]  # fixtures


@pytest.fixture
def engine(tmp_path: Path, settings: Settings) -> Iterator[ibis.BaseBackend]:
    with open_engine(tmp_path / "spill", settings) as engine:
        yield engine


@pytest.fixture
def logged(engine: ibis.BaseBackend, tmp_path: Path) -> Callable[..., ir.Table]:
    """Write events and read them back as the stage's log."""

    def read(events: Sequence[Event], attributes: Sequence[str] = (), config: RunConfig | None = None) -> ir.Table:
        folder = write_events(tmp_path / "events", events)
        return read_log(engine, folder, (config or make_config()).features.split, attributes, tmp_path / "log", print)

    return read
