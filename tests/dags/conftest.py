"""Airflow with a home of its own: set before the first import of airflow, which reads it once a process."""

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.worlds import REPOSITORY

os.environ["AIRFLOW_HOME"] = tempfile.mkdtemp(prefix="urm-airflow-")
os.environ["AIRFLOW__CORE__LOAD_EXAMPLES"] = "False"
os.environ["AIRFLOW__CORE__DAGS_FOLDER"] = str(REPOSITORY / "dags")


class RecordingTask:
    """Stands for the running task instance: keeps what is pushed as XCom."""

    dag_id = "recall_training"
    try_number = 1

    def __init__(self, task_id: str, run_id: str, map_index: int) -> None:
        self.task_id, self.run_id, self.map_index = task_id, run_id, map_index
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        """Keep the value."""
        self.pushed[key] = value


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Settings of this process and of its children point into a temporary folder; the services are not known."""
    from components.settings import get_settings

    for name in ("URM_MLFLOW_URI", "URM_MLFLOW_PUBLIC_URL", "URM_AIRFLOW_URL", "URM_AIRFLOW_PASSWORD", "URM_RUNS_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("URM_REDIS_URL", "redis://127.0.0.1:1/0")  # not that of services which run on this machine
    monkeypatch.setenv("URM_HOME", str(tmp_path / ".urm"))
    monkeypatch.setenv("URM_CONFIGS_DIR", str(REPOSITORY / "configs"))
    monkeypatch.setenv("URM_FEATURE_REPO_DIR", str(REPOSITORY / "feature_repo"))
    get_settings.cache_clear()
    yield tmp_path / ".urm"
    get_settings.cache_clear()


@pytest.fixture
def make_context():
    """Context of a task of a run, as Airflow hands it to `execute`."""

    def make(task_id: str, map_index: int = -1, **params: Any) -> dict[str, Any]:
        run_id = "manual__2026-11-25T10:00:00+00:00"
        given = {"config": "complete_journey", "overrides": [], "promote_anyway": False, "force": False} | params
        run = {"params": given, "run_id": run_id, "ti": RecordingTask(task_id, run_id, map_index)}
        return run | {"dag": SimpleNamespace(dag_id="recall_training", params={}), "dag_run": SimpleNamespace(conf={})}

    return make


@pytest.fixture
def render(make_context):
    """Fills in a task's templates as Airflow does before `execute`; returns the task and its context."""

    def fill(task, map_index: int = -1, **params: Any):
        context = make_context(task.task_id, map_index, **params)
        task.render_template_fields(context)
        return task, context

    return fill


@pytest.fixture
def run(render):
    """Renders and executes a task; returns its context."""

    def execute(task, **params: Any):
        task, context = render(task, **params)
        task.execute(context)
        return context

    return execute
