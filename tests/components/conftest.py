import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from components.settings import Settings
from tests.worlds import CONFIGS, make_settings


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy of the repository's configurations, to be spoilt at will."""
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a home of its own."""
    return make_settings(tmp_path / "home")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sends the log to the stream of its own call, which a CliRunner closes."""
    yield
    structlog.reset_defaults()
