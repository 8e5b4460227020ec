"""The repository as a DAG bundle from git: what Airflow finds in a clone that is not on PYTHONPATH."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.worlds import REPOSITORY

PARSE = """
import json, sys
from pathlib import Path
from airflow.dag_processing.dagbag import BundleDagBag  # what the DAG processor and a task's process load a bundle by

clone = Path(sys.argv[1])
bag = BundleDagBag(dag_folder=str(clone), bundle_path=clone, bundle_name="urm")
files = sorted(stats.file for stats in bag.dagbag_stats)
print(json.dumps({"dags": sorted(bag.dags), "errors": bag.import_errors, "files": files}))
"""


def test_a_clone_is_a_bundle_whose_dags_import_their_helpers(tmp_path: Path) -> None:
    clone, environment = tmp_path / "clone", tmp_path / "environment"
    shutil.copytree(REPOSITORY / "dags", clone / "dags", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".airflowignore", clone)
    (clone / "tests").mkdir()
    (clone / "tests" / "test_dag.py").write_text("raise RuntimeError('airflow parses a file that is no dag')")
    environment.mkdir()
    (environment / "components").symlink_to(REPOSITORY / "components")  # stands for the installed package

    variables = {"AIRFLOW_HOME": str(tmp_path), "AIRFLOW__CORE__LOAD_EXAMPLES": "False", "PYTHONPATH": str(environment)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE, str(clone)],
        cwd=tmp_path, env={**os.environ, **variables}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    names = sorted(path.stem for path in (REPOSITORY / "dags").glob("*.py") if path.stem != "__init__")
    assert found["errors"] == {}
    assert found["dags"] == names
    assert found["files"] == [f"dags/{name}.py" for name in names]
