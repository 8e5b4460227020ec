"""The Job of the back-fill, started and watched by its operator as `urm-airflow`.

Stand-ins without a cluster: tests/dags/test_recall_backfill.py, tests/components/recall/worker/test_backfill.py.
"""

import asyncio
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog

from components.client import RecallClient
from components.recall.state.backfill import read_progress
from components.recall.state.scripts import result_key
from components.release.publication import SERVING, read_publication
from tests.cluster.world import API, Object, Service, pause_until, write_kubeconfig
from tests.worlds.tiny import NUM_USERS

JOB = "recall-backfill"
USERS = [str(user) for user in range(NUM_USERS)]


class Task:
    """The task `backfill` of a DAG run, without an Airflow: what its worker and its triggerer do."""

    def __init__(self, service: Service, run_id: str, **params: Any) -> None:
        from airflow.sdk.exceptions import TaskDeferred

        from dags.common.tasks import backfill_task

        settings = service.settings.model_copy(update={"executor": "kubernetes"})
        self.context: Any = {
            "params": {"config": "tiny", "rate": 0, "shards": 2, "pods": 2} | params,
            "run_id": run_id,
            "dag": SimpleNamespace(dag_id="recall_backfill"),
        }
        self.operator: Any = backfill_task(settings)
        self.operator.job = add_config(self.operator.job(self.context))
        with pytest.raises(TaskDeferred) as deferred:
            self.operator.execute(self.context)
        path, arguments = deferred.value.trigger.serialize()
        assert path == "dags.common.backfill_trigger.BackfillTrigger"
        self.trigger: Any = type(deferred.value.trigger)(**arguments)  # as the database keeps it
        self.event: dict[str, Any] | None = None
        self._thread = threading.Thread(target=self._watch)

    def start(self) -> None:
        """Let the triggerer watch."""
        self._thread.start()

    def end(self, seconds: float = 240) -> dict[str, Any]:
        """The event of the trigger."""
        self._thread.join(seconds)
        assert self.event is not None
        return self.event

    def _watch(self) -> None:
        async def first() -> dict[str, Any]:
            async for event in self.trigger.run():
                found: dict[str, Any] = event.payload
                return found
            raise AssertionError

        self.event = asyncio.run(first())


def add_config(job: Object) -> Object:
    """The configuration of the tests, as their Deployments have it."""
    job["spec"]["template"]["spec"]["volumes"] += [{"name": "configs", "configMap": {"name": "test-configs"}}]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container["volumeMounts"] += [{"name": "configs", "mountPath": "/etc/urm/configs"}]
    container["env"] += [{"name": "URM_CONFIGS_DIR", "value": "/etc/urm/configs"}]
    container["resources"] = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
    return job


@pytest.fixture
def airflow(service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What operator and trigger log; no user has a result. No Job is left behind."""
    os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="urm-airflow-"))
    kubeconfig = write_kubeconfig(service.kubectl, "urm-airflow", tmp_path / "kubeconfig")
    connection = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(kubeconfig)}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps(connection))
    from dags.common import backfill_trigger

    monkeypatch.setattr(backfill_trigger, "POLL_SECONDS", 1.0)
    monkeypatch.setattr(backfill_trigger, "REPORT_SECONDS", 2.0)
    for pattern in ("urm:result:*", "urm:history*", "urm:backfill:*"):
        for key in list(service.redis.scan_iter(pattern)):
            service.redis.delete(key)
    with structlog.testing.capture_logs() as records:
        yield records
    service.kubectl("delete", "job", JOB, "--ignore-not-found")


def pods(service: Service, shard: int | None = None) -> list[Object]:
    found = service.kubectl.pods(JOB)
    label = "batch.kubernetes.io/job-completion-index"
    return [pod for pod in found if shard is None or pod["metadata"]["labels"][label] == str(shard)]


def test_a_pod_killed_midway_goes_on_and_every_user_has_results(service: Service, airflow: list[Any]) -> None:
    order = read_publication(service.redis, SERVING).order  # type: ignore[union-attr]
    task = Task(service, "first", rate=0.5)
    task.start()
    pause_until(lambda: len([one for one in read_progress(service.redis, order) if one.done >= 2]) == 2, 180)
    (killed,) = pods(service, 0)
    service.kubectl("delete", "pod", killed["metadata"]["name"], "--grace-period=0", "--force")
    done = next(one.done for one in read_progress(service.redis, order) if one.shard == 0)
    assert done < NUM_USERS / 2
    pause_until(lambda: pods(service, 0) and pods(service, 0)[0]["status"]["phase"] == "Running", 120)
    (successor,) = pods(service, 0)
    event = task.end()
    task.operator.finish(task.context, event)
    assert (event["complete"], event["figures"]["total"], event["figures"]["done"]) == (True, NUM_USERS, NUM_USERS)
    said = service.kubectl("logs", successor["metadata"]["name"])
    assert '"event": "back-fill goes on"' in said
    for user in USERS:
        assert service.redis.hget(result_key(user, "next_purchase"), "release_order") == str(order)
    assert all(one.finished for one in read_progress(service.redis, order))
    with RecallClient(f"http://{service.kubectl.address(API)}:8000", service.environment["URM_API_TOKEN"]) as api:
        assert {api.recall(user).source for user in USERS} == {"model"}
    lines = [record["event"] % record.get("positional_args", ()) for record in airflow]
    print(*lines, sep="\n")
    assert any("0 of 2 shards finished, 2 pods; release" in line and f"of {NUM_USERS} users" in line for line in lines)

    again = Task(service, "first")  # its worker was killed after the Job had ended: nothing is done twice
    again.start()
    assert again.end()["complete"]
    assert {pod["metadata"]["name"] for pod in pods(service)} >= {successor["metadata"]["name"]}
    other = Task(service, "second", shards=3)
    assert service.kubectl.read("job", JOB)["metadata"]["uid"] == other.trigger.uid != again.trigger.uid
    asyncio.run(other.trigger.on_kill())  # somebody marks the run as failed
    pause_until(lambda: not pods(service), 90)
    other.start()
    with pytest.raises(Exception, match=f"Job {JOB} is gone"):
        other.operator.finish(other.context, other.end())


def test_a_mistake_in_the_input_fails_at_once(service: Service, airflow: list[Any]) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    task = Task(service, "wrong", config="nowhere")
    task.start()
    event = task.end()
    assert service.kubectl.read("job", JOB)["status"].get("failed", 0) <= 2, "no shard was tried again"
    with pytest.raises(AirflowFailException, match=r"exit code 2: error .*nowhere.*PodFailurePolicy"):
        task.operator.finish(task.context, event)
