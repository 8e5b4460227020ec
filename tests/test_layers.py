"""The direction of imports is part of the architecture; its contracts stand in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

from tests.worlds import REPOSITORY


def test_the_contracts_of_import_linter_hold() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert process.returncode == 0, process.stdout
    assert " 0 broken" in process.stdout
