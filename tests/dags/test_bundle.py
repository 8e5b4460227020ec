"""DAG bundles: a clone of the repository, as its root or with `subdir: dags`, read where nothing else leads to it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.worlds import REPOSITORY, run_python

# What Airflow's DAG processor does with each file of a bundle, and its task runner with the file of a task.
READ = """
import json, sys
from airflow.dag_processing.bundles.local import LocalDagBundle
from airflow.dag_processing.dagbag import BundleDagBag

bundle = LocalDagBundle(name="clone", path=sys.argv[1])
bundle.initialize()
bag = BundleDagBag(bundle.path, bundle_path=bundle.path, bundle_name=bundle.name)
from dags.common import tasks
print(json.dumps({
    "dags": sorted(bag.dags), "errors": bag.import_errors, "files": sorted(bag.file_last_changed),
    "helpers": tasks.__file__, "template": tasks.POD_TEMPLATE.is_file(),
}))
"""


@pytest.mark.parametrize("subdir", ["", "dags"])
def test_a_clone_is_a_bundle(tmp_path: Path, subdir: str) -> None:
    clone = tmp_path / "clone"
    for name in ("components", "dags", "k8s", "tests"):
        shutil.copytree(REPOSITORY / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".airflowignore", clone)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["AIRFLOW_HOME"] = str(tmp_path / "airflow")
    process = run_python("-W", "ignore", "-P", "-c", READ, clone / subdir, cwd=tmp_path, env=environment)
    assert process.returncode == 0, process.stderr
    read = json.loads(process.stdout.splitlines()[-1])
    files = sorted(str(path) for path in (clone / "dags").glob("*.py") if path.stem != "__init__")
    read_from = {"helpers": str(clone / "dags" / "common" / "tasks.py"), "template": True}
    assert read == {"dags": [Path(file).stem for file in files], "errors": {}, "files": files} | read_from


# What the triggerer does with the name of a trigger's class. Airflow adds no bundle to its path.
IMPORT_TRIGGER = """
import sys
from airflow.jobs.triggerer_job_runner import TriggerRunner
print(TriggerRunner.get_trigger_by_classpath(type("", (), {"trigger_cache": {}})(), sys.argv[1]).__name__)
"""


@pytest.mark.parametrize(("path", "found"), [(str(REPOSITORY), True), (str(REPOSITORY / "dags"), False), ("", False)])
def test_the_triggerer_finds_the_trigger_on_its_python_path_only(tmp_path: Path, path: str, found: bool) -> None:
    environment = os.environ | {"AIRFLOW_HOME": str(tmp_path), "PYTHONPATH": path}
    name = "dags.trainjob.trigger.TrainJobTrigger"
    process = run_python("-W", "ignore", "-P", "-c", IMPORT_TRIGGER, name, cwd=tmp_path, env=environment)
    assert (process.returncode == 0) is found
    assert ("TrainJobTrigger" if found else "No module named") in process.stdout + process.stderr
