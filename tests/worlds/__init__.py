"""Small worlds that tests share: logs, item tables, models, releases and servers, with their fixtures."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from components.settings import Settings

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
PUBLIC_DATA = REPOSITORY.parent / "shared" / "data"  # real data sets; tests of them are skipped where it is absent


def make_settings(home: Path, redis_url: str = "redis://127.0.0.1:1/0") -> Settings:
    """Settings with all state under a folder, for one core; without an address there is no Redis."""
    repository = REPOSITORY / "feature_repo"
    return Settings(home=home, feature_repo_dir=repository, redis_url=redis_url, device="cpu", num_threads=1)


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, its output as text, in the repository unless the options of subprocess say otherwise."""
    command, usual = [sys.executable, *map(str, arguments)], {"cwd": REPOSITORY, "check": False}
    return subprocess.run(command, capture_output=True, text=True, **usual | options)
