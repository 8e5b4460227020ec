import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED, RESOURCE_DOES_NOT_EXIST
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from requests import ConnectionError
from structlog.testing import capture_logs

from components import tracking
from components.addresses import read_json
from components.config import load_config
from components.exceptions import ConfigError, DataError, UnavailableError
from components.flow import STAGES
from components.mlflow_server import no_answer
from components.settings import Settings
from components.storage import StageRun
from components.tracking import log_if_possible, parent_run_id, track
from tests.worlds import CONFIGS, REPOSITORY, wait_until
from tests.worlds.servers import free_port

CONFIG = CONFIGS / "complete_journey.yaml"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One SQLite MLflow for the module: making its tables takes seconds."""
    before = mlflow.get_tracking_uri()
    yield tmp_path_factory.mktemp("home")
    mlflow.set_tracking_uri(before)


@pytest.fixture
def stage(tmp_path: Path, home: Path) -> StageRun:
    return make_stage(tmp_path, Settings(home=home))


def make_stage(tmp_path: Path, settings: Settings, name: str = "baseline") -> StageRun:
    folders = {"run_dir": str(tmp_path / "run-7"), "folder": str(tmp_path / "run-7" / name / "print")}
    folders |= {"output": tmp_path / "output", "scratch": tmp_path / "scratch"}
    config = load_config(CONFIG)
    return StageRun(spec=STAGES[name], config=config, settings=settings, **folders, inputs={}, previous=None)


def test_a_stage_is_a_nested_run_of_the_pipelines_run(tmp_path: Path, home: Path, stage: StageRun) -> None:
    with track(stage) as run:
        mlflow.log_metric("loss", 0.5)
    sft = make_stage(tmp_path, Settings(home=home), "sft")
    with track(sft) as second:
        mlflow.log_param("steps", 3)

    client = MlflowClient()
    note = read_json(f"{stage.run_dir}/tracking.json")
    parent = client.get_run(note["run_id"])
    assert parent.info.run_name == "run-7"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {"config": "complete_journey", "seed": "0"}
    assert [artifact.path for artifact in client.list_artifacts(parent.info.run_id)] == ["config.yaml"]
    for active, name in ((run, "baseline"), (second, "sft")):
        child = client.get_run(active.info.run_id)
        assert child.info.status == "FINISHED"
        assert child.info.run_name == name
        assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
        assert child.data.tags["urm.stage"] == name
        assert child.data.tags["urm.run_dir"] == stage.run_dir
    assert client.get_run(run.info.run_id).data.metrics == {"loss": 0.5}
    assert mlflow.active_run() is None


def test_files_go_to_the_home_and_not_to_the_working_folder(
    home: Path, stage: StageRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with track(stage):
        mlflow.log_text("x", "note.txt")
    assert len(list((home / "mlflow" / "artifacts").rglob("note.txt"))) == 1
    assert not (tmp_path / "mlruns").exists()


OPEN = """
import sys, time
from pathlib import Path
import mlflow
from components.settings import Settings
from components.tracking import track_study
home, ready, go = map(Path, sys.argv[1:])
ready.touch()
while not go.exists():
    time.sleep(0.01)
with track_study(Settings(home=home), "new", ready.name):
    pass
"""


def test_the_first_two_stages_of_a_new_home_may_come_at_once(tmp_path: Path) -> None:
    ready, go = [tmp_path / "one", tmp_path / "other"], tmp_path / "go"
    arguments = [[sys.executable, "-c", OPEN, tmp_path / "home", path, go] for path in ready]
    both = [subprocess.Popen(given, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) for given in arguments]
    wait_until(lambda: all(path.exists() for path in ready))
    go.touch()
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said


def test_a_failing_stage_is_marked_failed(stage: StageRun) -> None:
    with pytest.raises(DataError), track(stage) as run:
        raise DataError("log", expected="rows", got="none", remedy="check the source")
    client = MlflowClient()
    assert client.get_run(run.info.run_id).info.status == "FAILED"
    assert mlflow.active_run() is None
    with track(stage):  # the retry
        pass
    assert client.get_run(parent_run_id(stage)).info.status == "FINISHED"


@pytest.mark.parametrize("error", [MlflowException("status 503"), ConnectionError("refused")])
def test_a_server_that_goes_away_is_a_matter_for_a_retry(error: Exception, stage: StageRun) -> None:
    said = r"MLflow at sqlite:.*: expected an answer, got (status 503|refused); start it with"
    with pytest.raises(UnavailableError, match=said), track(stage):
        raise error
    with pytest.raises(MlflowException, match="no such name"), track(stage):
        raise MlflowException.invalid_parameter_value("no such name")  # a defect of the body
    with pytest.raises(MlflowException, match="no run"), track(stage):
        raise MlflowException("no run", RESOURCE_DOES_NOT_EXIST)  # deleted meanwhile
    assert mlflow.active_run() is None


def test_a_user_without_permission_is_told_so(stage: StageRun) -> None:
    with pytest.raises(ConfigError, match="expected that it lets this user do this, got no edit; get"), track(stage):
        raise MlflowException("no edit", PERMISSION_DENIED)
    assert mlflow.active_run() is None


def test_a_server_that_goes_away_before_the_run_begins(stage: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = parent_run_id(stage)

    def fail(*_: object, **__: object) -> None:
        raise MlflowException("status 503")

    with monkeypatch.context() as away:
        away.setattr(SqlAlchemyStore, "create_run", fail)
        with pytest.raises(UnavailableError, match="expected an answer, got status 503"), track(stage):
            pass
    assert mlflow.active_run() is None
    assert MlflowClient().get_run(parent).info.status == "FAILED"


@pytest.mark.parametrize("outcome", ["a result", "an error"])
def test_a_run_that_cannot_be_ended_costs_neither_a_result_nor_an_error(
    outcome: str, stage: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = []

    def fail(*_: object, **__: object) -> None:
        patience.append(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
        raise MlflowException("status 503")

    with capture_logs() as said, monkeypatch.context() as away:
        with nullcontext() if outcome == "a result" else pytest.raises(DataError), track(stage) as run:
            away.setattr(SqlAlchemyStore, "update_run_info", fail)
            away.setattr(tracking, "require_server", fail_to_answer)
            if outcome == "an error":
                raise DataError("log", expected="rows", got="none", remedy="check the source")
    assert [line["event"] for line in said] == ["MLflow run stays RUNNING: it cannot be ended"] * 2
    assert patience == ["0", "0"]  # what MLflow's thread still has to send takes no minutes each
    assert "MLFLOW_HTTP_REQUEST_MAX_RETRIES" not in os.environ
    assert mlflow.active_run() is None
    assert MlflowClient().get_run(run.info.run_id).info.status == "RUNNING"


def fail_to_answer(uri: str) -> None:
    raise no_answer(uri, "status 503")


def test_a_curve_is_sent_in_order_and_a_lost_point_is_no_error(
    stage: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    log_metrics, tried = SqlAlchemyStore._log_metrics, []

    def log_or_fail(store: SqlAlchemyStore, run_id: str, metrics: list[mlflow.entities.Metric]) -> None:
        time.sleep(0.5 if metrics[0].step == 1 else 0)
        tried.append(metrics[0].step)
        if metrics[0].step == 2:
            raise MlflowException("status 503")
        log_metrics(store, run_id, metrics)

    with track(stage) as run:
        monkeypatch.setattr(SqlAlchemyStore, "_log_metrics", log_or_fail)
        begun = time.monotonic()
        for step in range(1, 6):
            mlflow.log_metrics({"loss": 1 / step}, step, synchronous=False)
        assert time.monotonic() - begun < 0.5
    assert tried == [1, 2, 3, 4, 5]
    points = MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, 1 / step) for step in (1, 3, 4, 5)]
    assert MlflowClient().get_run(run.info.run_id).info.status == "FINISHED"


def test_a_table_that_cannot_be_logged_costs_a_warning(stage: StageRun) -> None:
    def fail(error: Exception, _: str) -> None:
        raise error

    class DriverError(Exception):
        """As boto3 raises them, which is no dependency."""

    with capture_logs() as said:
        for error in (MlflowException("status 503"), ConnectionError("refused"), DriverError("no bucket")):
            log_if_possible(fail, error, "table.json")
    assert [(line["log_level"], line["what"]) for line in said] == [("warning", "table.json")] * 3
    with pytest.raises(MlflowException, match="no such name"):
        log_if_possible(fail, MlflowException.invalid_parameter_value("no such name"), "table.json")


def test_an_attempt_continues_the_run_of_the_one_before(stage: StageRun) -> None:
    stage.scratch.mkdir()
    with pytest.raises(DataError), track(stage, resume=True) as first:
        raise DataError("log", expected="rows", got="none", remedy="check the source")
    with track(stage, resume=True) as second:
        client = MlflowClient()
        assert client.get_run(first.info.run_id).info.status == "RUNNING"
    assert second.info.run_id == first.info.run_id
    assert client.get_run(first.info.run_id).info.status == "FINISHED"
    client.delete_run(first.info.run_id)
    with track(stage, resume=True) as third:
        pass
    assert third.info.run_id != first.info.run_id


def test_a_deleted_parent_is_made_again(stage: StageRun) -> None:
    first = parent_run_id(stage)
    assert parent_run_id(stage) == first
    MlflowClient().delete_run(first)
    second = parent_run_id(stage)
    assert second != first
    assert parent_run_id(stage) == second


def test_stages_that_begin_at_once_share_a_parent(
    tmp_path: Path, home: Path, stage: StageRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = parent_run_id(stage)
    with monkeypatch.context() as early:
        early.setattr(tracking, "read_json", lambda _: None)  # the other one looked before the note was there
        assert parent_run_id(make_stage(tmp_path, Settings(home=home), "sft")) == first
        other_run = replace(make_stage(tmp_path, Settings(home=home)), run_dir=f"{stage.run_dir}0")
        assert parent_run_id(other_run) != first
        early.setattr(tracking, "_AT_ONCE_MS", -1)  # long ago
        assert parent_run_id(stage) != first
    experiment = MlflowClient().get_run(first).info.experiment_id
    of_pipeline = MlflowClient().search_runs([experiment], f"tags.`urm.run_dir` = '{stage.run_dir}'")
    assert len(of_pipeline) == 2


def test_a_deleted_experiment_is_a_matter_of_the_user(tmp_path: Path, stage: StageRun) -> None:
    fresh = replace(stage, settings=Settings(home=tmp_path / "fresh"))
    run = MlflowClient(fresh.settings.tracking_uri).get_run(parent_run_id(fresh))
    (Path(fresh.run_dir) / "tracking.json").unlink()
    MlflowClient(fresh.settings.tracking_uri).delete_experiment(run.info.experiment_id)
    with pytest.raises(
        ConfigError, match=r"experiment complete_journey: expected one that takes runs, got Cannot set a"
    ):
        parent_run_id(fresh)


def test_another_server_gets_a_parent_of_its_own(tmp_path: Path, home: Path, stage: StageRun) -> None:
    first = parent_run_id(stage)
    other = make_stage(tmp_path, Settings(home=tmp_path / "other-home"))
    assert parent_run_id(other) != first
    assert read_json(f"{stage.run_dir}/tracking.json")["tracking_uri"] == other.settings.tracking_uri


def test_tags_lead_back_to_airflow(tmp_path: Path, home: Path) -> None:
    run = {"airflow_dag_id": "recall_training", "airflow_run_id": "manual__1"}
    settings = Settings(home=home, airflow_url="http://airflow:8080", **run)
    run_id = parent_run_id(make_stage(tmp_path, settings))
    tags = MlflowClient().get_run(run_id).data.tags
    assert tags["airflow.url"] == "http://airflow:8080/dags/recall_training/runs/manual__1"
    assert (tags["airflow.dag_id"], tags["airflow.run_id"]) == ("recall_training", "manual__1")


def test_the_page_of_a_run_is_under_the_public_address(tmp_path: Path, home: Path) -> None:
    stage = make_stage(tmp_path, Settings(home=home, mlflow_uri="http://in:1", mlflow_public_url="http://out:2/"))
    assert stage.settings.run_page("3", "r") == "http://out:2/#/experiments/3/runs/r?workflowType=machine_learning"


def test_a_server_that_is_down_is_said_at_once(tmp_path: Path, home: Path) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    clock = time.monotonic()
    with pytest.raises(UnavailableError, match=rf"MLflow at {uri}: expected an answer, got .*; start it with `urm up`"):
        parent_run_id(make_stage(tmp_path, Settings(home=home, mlflow_uri=uri)))
    assert time.monotonic() - clock < 10
    assert not (tmp_path / "run-7" / "tracking.json").exists()


def test_a_database_that_is_none(tmp_path: Path, home: Path) -> None:
    bad = tmp_path / "mlflow.db"
    bad.write_text("no database " * 100)
    with pytest.raises(UnavailableError, match=r"MLflow at sqlite:///.*: expected an answer, got"):
        parent_run_id(make_stage(tmp_path, Settings(home=home, mlflow_uri=f"sqlite:///{bad}")))
