from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from components.config import RunConfig
from components.settings import Settings
from tests.worlds.finished import REPOSITORY, make_run

__all__ = ["finished", "settings"]  # fixtures


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A run with validate, features and sft done; its directory and configuration."""
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings of a home of its own, with a copy of the configurations to be spoilt."""
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    return Settings(
        home=tmp_path / "home",
        configs_dir=tmp_path / "configs",
        feature_repo_dir=REPOSITORY / "feature_repo",
        device="cpu",
        mlflow_uri=f"sqlite:///{tmp_path / 'home' / 'mlflow' / 'mlflow.db'}",
    )
