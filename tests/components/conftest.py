from __future__ import annotations

import shutil
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A copy of the repository's configurations, to be spoilt at will."""
    return Path(shutil.copytree(CONFIGS, tmp_path / "configs"))
