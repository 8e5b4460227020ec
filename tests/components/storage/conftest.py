from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fsspec
import pytest

from components.config import RunConfig, load_config
from components.flow import STAGES
from components.settings import Settings
from components.storage import StageResult, run_stage
from tests.worlds.stages import CONFIG, Run


@pytest.fixture(autouse=True)
def toy_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stages of these tests leave some of the real ones' outputs, and some of their own."""
    for name in ("ingest", "validate", "sft"):
        outputs = {**STAGES[name].outputs, "deep": "", "x": ""}
        monkeypatch.setitem(STAGES, name, replace(STAGES[name], outputs=outputs, optional=tuple(outputs)))


@pytest.fixture
def config() -> RunConfig:
    return load_config(CONFIG)


@pytest.fixture
def memory() -> Iterator[str]:
    store = fsspec.filesystem("memory")
    yield "memory://runs"
    store.rm("/runs", recursive=True)


@pytest.fixture
def run(settings: Settings, config: RunConfig) -> Run:
    """Run a function as a stage."""

    def run(name: str, work: Any, run_dir: object, config: RunConfig = config, **options: Any) -> StageResult:
        return run_stage(name, work, config=config, run_dir=str(run_dir), settings=settings, **options)

    return run
