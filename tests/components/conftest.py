from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from tests.worlds import CONFIGS


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy of the repository's configurations, to be spoilt at will."""
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sends the log to the stream of its own call, which a CliRunner closes."""
    yield
    structlog.reset_defaults()
