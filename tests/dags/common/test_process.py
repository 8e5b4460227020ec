"""The operator that runs a stage as a process, with the real `urm` command."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest


@pytest.fixture
def make_task(home):
    from dags.common.process import StageProcessOperator

    return lambda stage: StageProcessOperator(task_id=stage, stage=stage)


def test_success_leaves_an_address_and_numbers_but_no_data(make_task, make_context):
    context = make_context("ingest", overrides=["source.max_users=5"])
    make_task("ingest").execute(context)
    summary = context["ti"].pushed["summary"]
    assert summary["result"].endswith("/runs/manual__2026-11-25T10-00-00-00-00/ingest/result.json")
    assert summary["counts"]["users"] == 5
    assert summary["reused_from"] is None


def test_a_mistake_in_the_input_is_not_tried_again(make_task, make_context):
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"urm ingest ended with exit code 2: .*no_such_config"):
        make_task("ingest").execute(make_context("ingest", config="no_such_config"))


def test_a_missing_earlier_stage_is_not_tried_again(make_task, make_context):
    from airflow.sdk.exceptions import AirflowFailException

    with pytest.raises(AirflowFailException, match=r"run `urm ingest` with the same"):
        make_task("validate").execute(make_context("validate"))


def _when_running(task, act):
    """Call `act` with the stage's process as soon as there is one."""

    def wait():
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            process = task._hook.sub_process if task._hook else None
            if process is not None and psutil.Process(process.pid).name() != "setpriv":
                return act(process)
            time.sleep(0.01)
        raise AssertionError("the stage did not start")

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_a_killed_stage_is_tried_again(make_task, make_context):
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    task = make_task("ingest")
    thread = _when_running(task, lambda process: os.kill(process.pid, signal.SIGKILL))
    with pytest.raises(AirflowException, match="exit code -9") as caught:
        task.execute(make_context("ingest"))
    thread.join()
    assert not isinstance(caught.value, AirflowFailException)


def test_on_kill_ends_the_whole_group(make_task, make_context):
    from airflow.sdk.exceptions import AirflowException

    task = make_task("ingest")
    thread = _when_running(task, lambda _: task.on_kill())
    with pytest.raises(AirflowException, match="exit code -15"):
        task.execute(make_context("ingest"))
    thread.join()
    with pytest.raises(ProcessLookupError):
        os.killpg(task._hook.sub_process.pid, 0)


def test_on_kill_before_the_start_does_nothing(make_task):
    make_task("ingest").on_kill()
