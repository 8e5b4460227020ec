"""The DAG and its operators; tests/cluster/test_backfill.py runs the Job on a cluster."""

import copy
import json
from functools import partial
from types import SimpleNamespace

import kubernetes_validate
import pytest
import structlog
import yaml
from kubernetes.client import V1Job, V1JobCondition, V1JobStatus, V1ObjectMeta
from kubernetes.client.exceptions import ApiException

from components.settings import Settings
from tests.worlds import REPOSITORY

FIGURES = {"release": "urm-1", "done": 5, "total": 9, "stored": 4, "current": 1, "failed": 0, "users_per_second": 2.0}
PARAMS = {"rate": 3, "shards": 4, "pods": 2}


@pytest.fixture(scope="module")
def dag():
    from airflow.dag_processing.dagbag import DagBag

    bag = DagBag(str(REPOSITORY / "dags" / "recall_backfill.py"))
    assert bag.import_errors == {}
    return bag.dags["recall_backfill"]


@pytest.fixture
def job(home, render):
    """The Job of a run, rendered."""
    from dags.common.tasks import backfill_task

    settings = Settings(executor="kubernetes", namespace="shop")
    task, context = render(backfill_task(settings), **PARAMS)
    return task, context


def test_it_runs_by_hand_or_after_what_changes_the_serving_release(dag):
    from airflow.dag_processing.dagbag import DagBag

    from dags.recall_backfill import PARAMS as FORM

    (task,) = dag.tasks
    assert set(dag.params) == set(FORM)
    assert (task.task_id, task.retries, task.pool) == ("backfill", 2, "default_pool")
    assert task.credentials == ["feast", "redis"]
    assert copy.deepcopy(dag.params).validate() == {"config": None, "rate": 0, "shards": 2, "pods": 2}
    bag = DagBag(str(REPOSITORY / "dags"))
    found = {task for one in bag.dags.values() for task in one.tasks if task.outlets}
    assert {task.task_id for task in found} == {"promote", "rollback"}
    (asset,) = {asset for task in found for asset in task.outlets}
    assert dag.timetable.asset_condition.objects == (asset,)
    assert dag.is_paused_upon_creation


def test_a_promotion_hands_its_configuration_on(home, make_context, dag):
    from typer.testing import CliRunner

    from components.cli.app import app
    from dags.common.backfill import backfill_arguments
    from dags.common.params import SERVING_RELEASE, announce_release

    event = SimpleNamespace(extra={})
    announce_release({**make_context("promote", config="shop"), "outlet_events": {SERVING_RELEASE: event}})
    assert event.extra == {"config": "shop"}

    def arguments(**context):
        return backfill_arguments({**make_context("backfill", rate=2.5, config=None), **context})

    after = arguments(triggering_asset_events={SERVING_RELEASE: [SimpleNamespace(extra={}), event]})
    assert after == ["recall", "backfill", "--config=shop", "--rate=2.5"]
    by_hand = [event, SimpleNamespace(extra={"from_rest_api": True})]
    assert arguments(triggering_asset_events={SERVING_RELEASE: by_hand}) == after
    # Nobody says which: URM_CONFIG of the process, or of the pod, does.
    assert arguments(triggering_asset_events={SERVING_RELEASE: by_hand[1:]}) == ["recall", "backfill", "--rate=2.5"]
    assert arguments() == ["recall", "backfill", "--rate=2.5"]
    given = backfill_arguments(make_context("backfill", rate=0, config="amazon_beauty"))
    assert given[2:] == ["--config=amazon_beauty", "--rate=0"]
    try:
        answer = CliRunner().invoke(app, [*after, "--help"])
    finally:
        structlog.reset_defaults()
    assert answer.exit_code == 0, answer.output


def test_as_a_process_a_mistake_in_the_settings_is_not_tried_again(home, run, monkeypatch):
    from airflow.sdk.exceptions import AirflowFailException

    from dags.common.tasks import backfill_task

    monkeypatch.setenv("URM_REDIS_URL", "redis://elsewhere:6379/0")
    with pytest.raises(AirflowFailException, match=r"urm recall ended with exit code 2: .*a password"):
        run(backfill_task(Settings(executor="local")), rate=1, config="complete_journey")


def test_the_job_is_the_template_with_what_run_and_table_say(job):
    from dags.common.backfill_trigger import CONTAINER

    task, _ = job
    assert task.template_fields == ("job",)
    spec, metadata = task.job["spec"], task.job["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("recall-backfill", "shop")
    assert metadata["annotations"] == {"urm.backfill/run": "recall_training/manual__2026-11-25T10:00:00+00:00"}
    assert (spec["completions"], spec["parallelism"], spec["activeDeadlineSeconds"]) == (4, 2, 168 * 3600)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["name"] == CONTAINER  # whose start the trigger watches
    assert container["image"] == "urm-recall-worker:0.1.0"
    given = "recall backfill --config=complete_journey --shard=$(JOB_COMPLETION_INDEX) --shards=4 --rate=1.5"
    assert container["args"] == [*given.split(), *"--host 0.0.0.0 --metrics-port 9101".split()]
    assert container["resources"]["limits"] == {"cpu": "1", "memory": "1792Mi", "ephemeral-storage": "20Gi"}
    assert "URM_AIRFLOW_RUN_ID" in [one["name"] for one in container["env"]]
    for version in ("1.32", "1.37"):
        kubernetes_validate.validate(json.loads(json.dumps(task.job)), version, strict=True)


def test_the_table_of_pods_reaches_the_job(home, render, tmp_path):
    from dags.common.tasks import backfill_task

    tolerations = [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}]
    row = {"image": "mine:1", "priority_class": "low", "tolerations": tolerations, "node_selector": {"pool": "spot"}}
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump({"backfill": {**row, "kueue_queue": "shop", "gpus": 1}}))
    settings = Settings(executor="kubernetes", pods_file=tmp_path / "pods.yaml")
    task, _ = render(backfill_task(settings), **PARAMS)
    pod = task.job["spec"]["template"]["spec"]
    assert (pod["containers"][0]["image"], pod["priorityClassName"]) == ("mine:1", "low")
    assert (pod["nodeSelector"], pod["tolerations"]) == ({"pool": "spot"}, tolerations)
    assert task.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "shop"
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert {"name": "URM_DEVICE", "value": "cuda"} in pod["containers"][0]["env"]


def test_how_the_job_ended_is_how_the_task_ends(job, caplog):
    from airflow.sdk.exceptions import AirflowException, AirflowFailException

    task, context = job
    end = partial(dict, complete=False, reason="the reason", exit_code=None, figures={})
    with pytest.raises(AirflowFailException, match="urm recall backfill ended with exit code 2: the reason"):
        task.finish(context, end(exit_code=2))
    for event in (end(exit_code=3), end()):
        with pytest.raises(AirflowException, match="the reason") as raised:
            task.finish(context, event)
        assert not isinstance(raised.value, AirflowFailException)


class Jobs:
    """The part of a cluster's API that the operator uses."""

    def __init__(self):
        self.found, self.made = None, 0

    def create_namespaced_job(self, namespace, body):
        self.made += 1
        metadata = V1ObjectMeta(**body["metadata"], uid=f"uid-{self.made}")
        self.found = V1Job(metadata=metadata, status=V1JobStatus())
        return self.found

    def read_namespaced_job(self, name, namespace):
        if self.found is None:
            raise ApiException(404)
        return self.found

    def delete_namespaced_job(self, name, namespace, body):
        if body.preconditions.uid == self.read_namespaced_job(name, namespace).metadata.uid:
            self.found = None


def test_a_complete_job_is_taken_up_once_and_a_cleared_task_starts_over(job, monkeypatch):
    from airflow.sdk.exceptions import TaskDeferred

    task, context = job
    jobs = Jobs()
    monkeypatch.setattr(type(task), "_hook", lambda _: SimpleNamespace(batch_v1_client=jobs, is_in_cluster=False))

    def wait():
        with pytest.raises(TaskDeferred) as deferred:
            task.execute(context)
        return deferred.value.trigger.uid

    first = wait()
    jobs.found.status.conditions = [V1JobCondition(type="Complete", status="True")]
    assert wait() == first  # its worker was killed before it could say how the Job ended
    task.finish(context, {"complete": True, "uid": first, "reason": "", "exit_code": None, "figures": FIGURES})
    assert jobs.found is None
    assert wait() != first


def test_a_job_that_cannot_start_is_deleted_so_that_a_cleared_task_starts_over(job, monkeypatch):
    from airflow.sdk.exceptions import AirflowFailException

    task, context = job
    jobs = Jobs()
    monkeypatch.setattr(type(task), "_hook", lambda _: SimpleNamespace(batch_v1_client=jobs, is_in_cluster=False))
    uid = jobs.create_namespaced_job("shop", task.job).metadata.uid
    event = {"complete": False, "hopeless": True, "uid": uid, "reason": "no image", "exit_code": None, "figures": {}}
    with pytest.raises(AirflowFailException, match=r"^no image$"):
        task.finish(context, event)
    assert jobs.found is None


def test_a_job_made_by_hand_is_replaced(job, monkeypatch):
    from airflow.sdk.exceptions import TaskDeferred

    task, context = job
    jobs = Jobs()
    monkeypatch.setattr(type(task), "_hook", lambda _: SimpleNamespace(batch_v1_client=jobs, is_in_cluster=False))
    jobs.create_namespaced_job("shop", task.job).metadata.annotations = None  # by `kubectl create`
    with pytest.raises(TaskDeferred) as deferred:
        task.execute(context)
    assert deferred.value.trigger.uid == jobs.found.metadata.uid == "uid-2"


def test_figures_of_shards_are_summed_and_said():
    from dags.common.backfill import describe, read_figures, sum_up

    other = {**FIGURES, "done": 10, "total": 10, "failed": 1}
    assert read_figures(json.dumps({"event": "back-fill", **FIGURES})).items() >= FIGURES.items()
    assert read_figures("Traceback") == read_figures('{"event": "back-fill waits for live events"}') == {}
    text = describe(sum_up([FIGURES, other]))
    assert text == (
        "release urm-1: 15 of 19 users, 8 computed, 2 had results, 1 failed; 2.0 users per second, 0.0 h left"
    )


def test_a_mistake_in_the_input_is_told_from_other_failures():
    from kubernetes_asyncio.client import V1JobCondition

    from dags.common.backfill_trigger import _judge_failure

    def pod(exit_code, message):
        terminated = SimpleNamespace(exit_code=exit_code, message=message, reason="Error")
        status = SimpleNamespace(state=SimpleNamespace(terminated=terminated))
        return SimpleNamespace(status=SimpleNamespace(container_statuses=[status]))

    condition = V1JobCondition(type="Failed", status="True", reason="FailedIndexes", message="2 indexes")
    found = _judge_failure("recall-backfill", condition, [pod(0, ""), pod(137, "{}"), pod(2, "{}\nerror x: expected")])
    assert (found["exit_code"], found["reason"]) == (2, "error x: expected (Job recall-backfill: FailedIndexes)")
    found = _judge_failure("recall-backfill", condition, [])
    assert (found["exit_code"], found["reason"]) == (None, "Job recall-backfill failed: FailedIndexes: 2 indexes")
