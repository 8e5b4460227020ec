"""Small worlds that tests share: logs, item tables, models, releases and servers, with their fixtures."""

import ast
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from components.settings import Settings

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
DEVICE = os.environ.get("URM_DEVICE", "cpu")  # of all that may run on a GPU: "cpu" or "cuda", see `make gpu`
PUBLIC_DATA = REPOSITORY.parent / "shared" / "data"  # real data sets; tests of them are skipped where it is absent


def make_settings(home: Path, redis_url: str = "redis://127.0.0.1:1/0") -> Settings:
    """Settings with all state under a folder, for one core; without an address there is no Redis."""
    repository = REPOSITORY / "feature_repo"
    return Settings(home=home, feature_repo_dir=repository, redis_url=redis_url, device=DEVICE, num_threads=1)


@cache
def imported_names(path: Path) -> frozenset[str]:
    """Modules that a file imports, at its head or inside a function, and the names it takes from them with theirs."""
    nodes = list(ast.walk(ast.parse(path.read_bytes())))
    whole = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    taken = [(node.module, alias.name) for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names]
    return frozenset(whole.union(*({module, f"{module}.{name}"} for module, name in taken if module)))


def run_python(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python to its end, its output as text, in the repository unless the options of subprocess say otherwise."""
    command, usual = [sys.executable, *map(str, arguments)], {"cwd": REPOSITORY, "check": False}
    return subprocess.run(command, capture_output=True, text=True, **usual | options)


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the condition did not hold within {seconds} s")
        time.sleep(0.02)
