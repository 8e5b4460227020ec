"""A stage is a row in `components/flow.py`, a file in `components/stages/` and its test.

Shown by a toy stage in a copy of the tree: its command, its DAG task with arrows and its rows in the tables of the docs
come from the row alone.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.worlds import REPOSITORY, run_python

ROW = """
        StageSpec(
            name="digest",
            summary="How many events each user has.",
            inputs=("ingest",),
            outputs={"digest": "file, JSON: user → number of events"},
            sections=(),
            resources=Resources(hours=0.25, pool=False),
            flags={"sorted": "Write the busiest users first."},
        ),
"""
STAGE = '''
"""Stage `digest`: how many events each user has."""

import json
from collections import Counter

import pyarrow.parquet as pq

from components.storage import StageReport, StageRun


def run(stage: StageRun) -> StageReport:
    """Count the events of each user."""
    users = pq.read_table(stage.path("ingest", "events"), columns=["user_id"]).column("user_id").to_pylist()
    counts = Counter(users).most_common() if stage.options["sorted"] else Counter(users).items()
    (stage.output / "digest.json").write_text(json.dumps(dict(counts)))
    return StageReport(outputs={"digest": "digest.json"}, counts={"users": len(set(users))})
'''
DERIVED = """
import json
from airflow.dag_processing.dagbag import DagBag
from benchmarks.flow_tables import outputs, stages

bag = DagBag("dags/recall_training.py")
task = bag.dags["recall_training"].get_task("digest")
print(json.dumps({
    "errors": bag.import_errors,
    "upstream": sorted(task.upstream_task_ids),
    "downstream": sorted(task.downstream_task_ids),
    "seconds": task.execution_timeout.total_seconds(),
    "page": task.doc_md,
    "param": bag.dags["recall_training"].params.get_param("sorted").description,
    "row": [line for line in stages().splitlines() if "`digest`" in line],
    "output": [line for line in outputs().splitlines() if "digest" in line],
}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the row and the stage's file."""
    copy = tmp_path_factory.mktemp("tree")
    for name in ("components", "dags", "benchmarks", "configs", "feature_repo", "k8s"):
        ignored = shutil.ignore_patterns("__pycache__", "evaluations")
        shutil.copytree(REPOSITORY / name, copy / name, ignore=ignored)
    flow = copy / "components" / "flow.py"
    text = flow.read_text()
    end = text.index("    )\n}\n\n# Studies")
    flow.write_text(text[:end] + ROW.lstrip("\n") + text[end:])
    (copy / "components" / "stages" / "digest.py").write_text(STAGE.lstrip())
    return copy


def _python(tree: Path, *arguments: str) -> str:
    """Run Python in the copy; the repository itself is not on its path."""
    environment = os.environ | {
        "PYTHONPATH": str(tree), "URM_HOME": str(tree / ".urm"), "AIRFLOW_HOME": str(tree / "airflow"),
        "URM_CONFIGS_DIR": str(tree / "configs"), "COLUMNS": "200",
    }  # fmt: skip
    process = run_python("-W", "ignore", *arguments, cwd=tree, env=environment)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def test_the_command(tree: Path) -> None:
    help_text = _python(tree, "-m", "components", "digest", "--help")
    assert "How many events each user has." in help_text
    assert "Write the busiest users first." in help_text
    options = ("--run-dir", "toy", "--set", "source.max_users=5")
    _python(tree, "-m", "components", "ingest", *options)
    _python(tree, "-m", "components", "digest", "--sorted", *options)
    result = json.loads((tree / ".urm" / "runs" / "toy" / "digest" / "result.json").read_text())
    assert result["counts"] == {"users": 5}
    numbers = list(json.loads(Path(result["outputs"]["digest"]).read_text()).values())
    assert numbers == sorted(numbers, reverse=True)


def test_the_dag_task_and_the_rows_of_the_docs(tree: Path) -> None:
    found = json.loads(_python(tree, "-c", DERIVED).splitlines()[-1])
    place = {"errors": {}, "upstream": ["ingest"], "downstream": [], "seconds": 900}
    texts = {"page": "How many events each user has.", "param": "Write the busiest users first."}
    row = "| `digest` | How many events each user has. |"
    output = "| digest | `digest` | file, JSON: user → number of events |"
    assert found == place | texts | {"row": [row], "output": [output]}
