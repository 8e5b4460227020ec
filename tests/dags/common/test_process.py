"""The operator that runs a stage as a process, with the real `urm` command."""

import json
import os
import signal
import sys
import threading

import psutil
import pytest

from components.flow import STAGES
from components.settings import get_settings
from tests.worlds import wait_until


@pytest.fixture
def make_task(home):
    from dags.common.process import StageProcessOperator

    return lambda stage: StageProcessOperator(task_id=stage, stage=stage)


def test_success_leaves_an_address_and_numbers_but_no_data(make_task, run):
    context = run(make_task("ingest"), overrides=["source.max_users=5"])
    summary = context["ti"].pushed["summary"]
    assert summary["result"].endswith("/runs/manual__2026-11-25T10-00-00-00-00/ingest/result.json")
    assert summary["counts"]["users"] == 5
    assert summary["reused_from"] is None


def test_a_mistake_in_the_input_and_a_missing_earlier_stage_are_not_tried_again(make_task, run):
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"urm ingest ended with exit code 2: .*no_such_config"):
        run(make_task("ingest"), config="no_such_config")
    with pytest.raises(AirflowFailException, match=r"run `urm ingest` with the same"):
        run(make_task("validate"))


def test_the_engine_reaches_the_stages_that_run_on_it_and_no_others(make_task, render, monkeypatch):
    from dags.common.process import UrmProcessOperator

    monkeypatch.setenv("URM_ENGINE", "spark")
    monkeypatch.setenv("URM_SPARK_MASTER", "spark://somewhere:7077")
    get_settings.cache_clear()
    tasks = {stage: render(make_task(stage))[0] for stage in STAGES}
    tasks["show"] = render(UrmProcessOperator(task_id="show", arguments=["show"]))[0]
    engines = {name: task.environment["URM_ENGINE"] for name, task in tasks.items()}
    assert engines == {name: "spark" if name in ("validate", "features") else "duckdb" for name in tasks}
    assert tasks["features"].environment["URM_SPARK_MASTER"] == "spark://somewhere:7077"


def _when_running(task, act):
    """Call `act` with the stage's process as soon as there is one."""

    def is_running():
        process = task._hook.sub_process if task._hook else None
        return process is not None and psutil.Process(process.pid).name() != "setpriv"

    def wait():
        wait_until(is_running)
        act(task._hook.sub_process)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_killed_stage_is_tried_again(make_task, run):
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    task = make_task("ingest")
    thread = _when_running(task, lambda process: os.kill(process.pid, signal.SIGKILL))
    with pytest.raises(AirflowException, match="exit code -9") as caught:
        run(task)
    thread.join()
    assert not isinstance(caught.value, AirflowFailException)


def test_on_kill_ends_the_whole_group(make_task, run):
    from airflow.sdk.exceptions import AirflowException

    task = make_task("ingest")
    thread = _when_running(task, lambda _: task.on_kill())
    with pytest.raises(AirflowException, match="exit code -15"):
        run(task)
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.killpg(task._hook.sub_process.pid, 0)


def test_on_kill_before_the_start_does_nothing(make_task):
    make_task("ingest").on_kill()


# Everything that must not reach a stage, and what only some stages need.
SECRETS = {
    "AIRFLOW__API_AUTH__JWT_SECRET": "jwt", "AIRFLOW__API__SECRET_KEY": "key", "AIRFLOW_CONN_DB": "postgres://u:p@h/d",
    "URM_AIRFLOW_PASSWORD": "admins", "GITHUB_TOKEN": "token",
}  # fmt: skip
FEAST = {"FEAST_REGISTRY_URI": "postgres://u:p@h/d"}
MLFLOW = {"MLFLOW_TRACKING_PASSWORD": "tracked", "URM_MLFLOW_URI": "http://u:p@mlflow"}
REDIS = {"URM_REDIS_URL": "redis://:p@redis/0"}
PLAIN = {"AWS_SECRET_ACCESS_KEY": "s3", "OMP_NUM_THREADS": "1", "URM_DEVICE": "cpu", "OTEL_SERVICE_NAME": "urm"}


@pytest.fixture
def printed(monkeypatch, tmp_path):
    """Has the program `urm` print its environment; gives a function that reads it after a task has run."""
    program = tmp_path / "bin" / "urm"
    program.parent.mkdir()
    output = tmp_path / "environment.json"
    script = f"import json, os\njson.dump(dict(os.environ), open({str(output)!r}, 'w'))\n"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o755)
    monkeypatch.setattr("dags.common.process.URM", program)
    for name, value in (SECRETS | FEAST | MLFLOW | REDIS | PLAIN).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    return lambda: json.loads(output.read_text())


@pytest.mark.parametrize(
    ("stage", "needed"), [("features", FEAST), ("sft", MLFLOW), ("promote", FEAST | MLFLOW | REDIS)]
)
def test_a_process_has_no_secret_that_its_stage_does_not_need(make_task, render, printed, stage, needed):
    from dags.common.process import UrmProcessOperator

    task, context = render(make_task(stage))
    UrmProcessOperator.execute(task, context)
    found = printed()
    watched = SECRETS | FEAST | MLFLOW | REDIS | PLAIN
    assert {name: value for name, value in found.items() if name in watched} == PLAIN | needed
    assert found["PATH"] == os.environ["PATH"]


def test_the_rendered_tab_shows_the_command_and_its_settings(make_task, render, printed, home):
    task, _ = render(make_task("release"), overrides=["urm.max_steps=5"], promote_anyway=True)
    assert task.template_fields == ("arguments", "environment")
    assert task.arguments == [
        *("release", "--config", "complete_journey", "--run-dir"),
        f"{home}/runs/manual__2026-11-25T10-00-00-00-00",
        *("--set", "urm.max_steps=5", "--promote-anyway"),
    ]
    assert task.environment["URM_DEVICE"] == "cpu"
    assert task.environment["URM_HOME"] == str(home)
    assert task.environment["URM_AIRFLOW_RUN_ID"] == "manual__2026-11-25T10:00:00+00:00"
    assert not (SECRETS | MLFLOW | REDIS).keys() & task.environment.keys()
