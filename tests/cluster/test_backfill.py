"""The Job of the back-fill, started and watched by its operator as `urm-airflow`.

Stand-ins without a cluster: tests/dags/test_recall_backfill.py, tests/components/recall/worker/test_backfill.py.
"""

import asyncio
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import redis
import structlog

from components.recall.state.backfill import read_progress
from components.recall.state.scripts import result_key
from components.recall.state.store import Result
from components.redis_client import open_redis
from components.release.bundle import hash_manifest
from components.release.publication import SERVING, Publication
from components.settings import Settings
from tests.cluster.world import (
    PASSWORD,
    STORE,
    Kubectl,
    Object,
    apply_base,
    build_release,
    make_bucket,
    pause_until,
    store_variables,
    write_kubeconfig,
)
from tests.worlds import REPOSITORY
from tests.worlds.tiny import NUM_USERS, make_config

JOB, ORDER = "recall-backfill", 5
USERS = [str(user) for user in range(NUM_USERS)]


@dataclass
class Place:
    """A namespace whose Redis names a release as the serving one; no worker runs.

    Attributes:
        kubectl: In the namespace.
        release: Name of the release.
        redis: A client of its Redis.
        settings: Of the commands of the tests.
    """

    kubectl: Kubectl
    release: str
    redis: redis.Redis
    settings: Settings


@pytest.fixture(scope="module")
def place(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Redis and object store, with a release of the tiny world."""
    home = tmp_path_factory.mktemp("home")
    folder = tmp_path_factory.mktemp("kustomize")
    with apply_base(folder, make_config(), {}) as own, pytest.MonkeyPatch.context() as patch:
        own("scale", "deployment", "--all", "--replicas=0")
        address = f"redis://urm:{PASSWORD}@{own.address('redis')}:6379/0"
        shared = {"URM_REDIS_URL": address} | store_variables(f"http://{own.address('s3')}:5000")
        literals = [f"--from-literal={key}={text}" for key, text in shared.items()]
        own("create", "secret", "generic", "urm-credentials", *literals)
        for key, text in shared.items():
            patch.setenv(key, text)
        store = make_bucket()
        settings = Settings(
            home=home, configs_dir=home, feature_repo_dir=REPOSITORY / "feature_repo", runs_uri=f"{STORE}/runs",
            redis_url=address, namespace=own.namespace, executor="kubernetes", device="cpu", num_threads=1,
        )  # fmt: skip
        made = build_release(settings, home, 0)
        store.get_file(f"{made.bundle}/manifest.json", str(home / "manifest.json"))
        serving = Publication(release=made.name, bundle=made.bundle, manifest=hash_manifest(home), order=ORDER)
        client = open_redis(address)
        client.set(SERVING, serving.model_dump_json())
        yield Place(own, made.name, client, settings)


class Task:
    """The task `backfill` of a DAG run, without an Airflow: what its worker and its triggerer do."""

    def __init__(self, place: Place, run_id: str, image: str = "", **params: Any) -> None:
        from airflow.sdk.exceptions import TaskDeferred

        from dags.common.tasks import backfill_task

        self.context: Any = {
            "params": {"config": "tiny", "rate": 0, "shards": 2, "pods": 2} | params,
            "run_id": run_id,
            "dag": SimpleNamespace(dag_id="recall_backfill"),
        }
        self.operator = cast(Any, backfill_task(place.settings))
        self.operator.job = add_config(self.operator.job(self.context))
        if image:
            self.operator.job["spec"]["template"]["spec"]["containers"][0]["image"] = image
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

    def end(self, seconds: float = 600) -> dict[str, Any]:
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
def airflow(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """What operator and trigger log. No Job is left behind."""
    os.environ.setdefault("AIRFLOW_HOME", tempfile.mkdtemp(prefix="urm-airflow-"))
    kubeconfig = write_kubeconfig(place.kubectl, "urm-airflow", tmp_path / "kubeconfig")
    connection = {"conn_type": "kubernetes", "extra": {"kube_config_path": str(kubeconfig)}}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps(connection))
    from dags.common import backfill_trigger

    monkeypatch.setattr(backfill_trigger, "POLL_SECONDS", 1.0)
    monkeypatch.setattr(backfill_trigger, "REPORT_SECONDS", 2.0)
    with structlog.testing.capture_logs() as records:
        yield records
    place.kubectl("delete", "job", JOB, "--ignore-not-found")


def pods(place: Place, shard: int | None = None) -> list[Object]:
    found = place.kubectl.pods(JOB)
    label = "batch.kubernetes.io/job-completion-index"
    return [pod for pod in found if shard is None or pod["metadata"]["labels"][label] == str(shard)]


def test_a_pod_killed_midway_goes_on_and_every_user_has_results(place: Place, airflow: list[Any]) -> None:
    task = Task(place, "first", rate=0.5)
    task.start()
    pause_until(lambda: len([one for one in read_progress(place.redis, ORDER) if one.done >= 2]) == 2, 400)
    (killed,) = pods(place, 0)
    place.kubectl("delete", "pod", killed["metadata"]["name"], "--grace-period=0", "--force")
    done = next(one.done for one in read_progress(place.redis, ORDER) if one.shard == 0)
    assert done < NUM_USERS / 2
    pause_until(lambda: pods(place, 0) and pods(place, 0)[0]["status"]["phase"] == "Running", 300)
    (successor,) = pods(place, 0)
    event = task.end()
    assert (event["complete"], event["figures"]["total"], event["figures"]["done"]) == (True, NUM_USERS, NUM_USERS)
    said = place.kubectl("logs", successor["metadata"]["name"])
    assert '"event": "back-fill goes on"' in said
    for user in USERS:
        found = Result.model_validate_json(str(place.redis.hget(result_key(user, "next_purchase"), "body")))
        assert (found.release, found.event_id) == (place.release, None)
    assert all(one.finished for one in read_progress(place.redis, ORDER))
    lines = [record["event"] % record.get("positional_args", ()) for record in airflow]
    print(*lines, sep="\n")
    assert any("0 of 2 shards finished, 2 pods; release" in line and f"of {NUM_USERS} users" in line for line in lines)

    again = Task(place, "first")  # its worker was killed after the Job had ended: nothing is done twice
    again.start()
    assert again.end()["complete"]
    assert {pod["metadata"]["name"] for pod in pods(place)} >= {successor["metadata"]["name"]}
    again.operator.finish(again.context, event)
    pause_until(lambda: not pods(place), 200)
    other = Task(place, "second", shards=3)
    assert place.kubectl.read("job", JOB)["metadata"]["uid"] == other.trigger.uid != again.trigger.uid
    asyncio.run(other.trigger.on_kill())  # somebody marks the run as failed
    pause_until(lambda: not pods(place), 200)
    other.start()
    with pytest.raises(Exception, match=f"Job {JOB} is gone"):
        other.operator.finish(other.context, other.end())


def test_a_mistake_in_the_input_fails_at_once(place: Place, airflow: list[Any]) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    task = Task(place, "wrong", config="nowhere")
    task.start()
    event = task.end()
    assert place.kubectl.read("job", JOB)["status"].get("failed", 0) <= 2, "no shard was tried again"
    with pytest.raises(AirflowFailException, match=r"exit code 2: error .*nowhere.*PodFailurePolicy"):
        task.operator.finish(task.context, event)


def test_a_job_whose_image_is_missing_is_given_up_and_deleted(
    place: Place, airflow: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from airflow.sdk.exceptions import AirflowFailException

    from dags.common import backfill_trigger

    monkeypatch.setattr(backfill_trigger, "MISSING_SECONDS", 5)
    task = Task(place, "no-image", image="urm-nothing:1")
    task.start()
    event = task.end(300)
    assert (event["complete"], event["hopeless"]) == (False, True)
    with pytest.raises(AirflowFailException, match=r"expected all it needs to start, got .*[Ii]mage.*urm-nothing"):
        task.operator.finish(task.context, event)
    pause_until(lambda: not pods(place), 200)
