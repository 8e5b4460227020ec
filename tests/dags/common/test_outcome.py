import json
import logging

import pytest

RUN = "manual__2026-11-25T10-00-00-00-00"


@pytest.fixture
def leave_result(home):
    """Writes a stage's result.json, and the gate's verdict beside it."""

    def leave(stage, metrics=None, verdict=None):
        folder = home / "runs" / RUN / stage
        folder.mkdir(parents=True)
        outputs = {}
        if verdict is not None:
            (folder / "verdict.json").write_text(json.dumps(verdict))
            outputs["verdict"] = str(folder / "verdict.json")
        content = {"seconds": 1.5, "counts": {"rows": 3}, "metrics": metrics or {}, "outputs": outputs}
        (folder / "result.json").write_text(json.dumps(content))

    return leave


@pytest.fixture
def gate(home):
    """The gate's task within its DAG."""
    from airflow.sdk import DAG

    from dags.common.process import StageProcessOperator

    with DAG("recall_training", schedule=None):
        tasks = [StageProcessOperator(task_id=stage, stage=stage) for stage in ("gate", "release", "promote")]
        tasks[0] >> tasks[1] >> tasks[2]
    return tasks[0]


FAILED = {"passed": False, "verdict": "URM is behind.", "reasons": ["won 3 tasks, needs 5"]}
PASSED = {"passed": True, "verdict": "URM is ahead.", "reasons": []}


def test_only_numbers_travel(leave_result, make_context, home):
    from dags.common.process import StageProcessOperator

    leave_result("evaluate", metrics={"lift": 0.1, "tasks": {"a": {"urm": 1.0}}, "note": "text", "tasks_won": 4})
    context = make_context("evaluate")
    StageProcessOperator(task_id="evaluate", stage="evaluate").finish(context)
    assert context["ti"].pushed["summary"]["metrics"] == {"lift": 0.1, "tasks_won": 4}


def test_failed_gate_skips_release_and_promote(leave_result, make_context, gate, caplog):
    from airflow.sdk.exceptions import DownstreamTasksSkipped

    leave_result("gate", verdict=FAILED)
    context = make_context("gate")
    with caplog.at_level(logging.INFO), pytest.raises(DownstreamTasksSkipped) as caught:
        gate.finish(context)
    assert set(caught.value.tasks) == {"release", "promote"}
    assert context["ti"].pushed["skipmixin_key"] == {"skipped": caught.value.tasks}
    assert context["ti"].pushed["summary"]["counts"] == {"rows": 3}


@pytest.mark.parametrize("executor", ["local", "kubernetes"])
def test_airflow_asks_the_gate_before_a_cleared_task_runs(home, executor):
    """In the serialised DAG, which is what the scheduler reads."""
    from airflow.sdk import DAG
    from airflow.serialization.serialized_objects import DagSerialization

    from components.settings import Settings
    from dags.common.tasks import stage_task

    with DAG("recall_training", schedule=None) as dag:
        stage_task("gate", Settings(executor=executor)) >> stage_task("release", Settings(executor=executor))
    read = DagSerialization.deserialize_dag(DagSerialization.serialize_dag(dag))
    assert read.get_task("gate").inherits_from_skipmixin


@pytest.mark.parametrize(("verdict", "promote_anyway"), [(FAILED, True), (PASSED, False)])
def test_other_gates_let_the_chain_go_on(leave_result, make_context, gate, verdict, promote_anyway):
    leave_result("gate", verdict=verdict)
    context = make_context("gate", promote_anyway=promote_anyway)
    gate.finish(context)
    assert "skipmixin_key" not in context["ti"].pushed


@pytest.mark.parametrize(
    ("code", "kind"), [(1, "AirflowException"), (2, "AirflowFailException"), (-9, "AirflowException")]
)
def test_exit_codes(code, kind):
    from airflow.sdk import exceptions

    from dags.common.outcome import raise_for_exit_code

    with pytest.raises(exceptions.AirflowException, match=f"exit code {code}: why") as caught:
        raise_for_exit_code("sft", code, "why\n")
    assert type(caught.value) is getattr(exceptions, kind)
    raise_for_exit_code("sft", 0, "")  # no error


def test_mlflow_link(home, gate, monkeypatch, make_context):
    from components.settings import get_settings
    from dags.common.outcome import MlflowLink

    monkeypatch.setenv("URM_MLFLOW_URI", "http://mlflow.example:5000")
    get_settings.cache_clear()
    ti = make_context("gate")["ti"]
    assert MlflowLink().get_link(gate, ti_key=ti) == ""
    note = home / "runs" / RUN / "tracking.json"
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"experiment_id": "3", "run_id": "abc"}))
    assert MlflowLink().get_link(gate, ti_key=ti) == (
        "http://mlflow.example:5000/#/experiments/3/runs/abc?workflowType=machine_learning"
    )


def test_a_long_verdict_is_cut_and_leaves_every_reason_and_the_link(home):
    from dags.common.outcome import NOTE_LENGTH, word_note

    reasons = [f"{number}. " + "reason " * 20 for number in range(4)]
    note = word_note("Gate FAILED.", {"verdict": "found " * 200, "reasons": reasons}, "http://mlflow.example/run")
    assert len(note) == NOTE_LENGTH
    assert all(reason in note for reason in reasons)
    assert "found" in note
    assert note.endswith("[MLflow run](http://mlflow.example/run)")


def test_a_note_that_cannot_be_written_is_a_warning(home, monkeypatch, make_context, caplog):
    from components.settings import get_settings
    from dags.common.outcome import write_notes

    monkeypatch.setenv("URM_AIRFLOW_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("URM_AIRFLOW_PASSWORD", "secret")
    get_settings.cache_clear()
    with caplog.at_level(logging.WARNING):
        write_notes("text", make_context("gate"))
    assert "No note written: Airflow at http://127.0.0.1:9" in caplog.text
    assert "secret" not in caplog.text
