"""A TrainJob of two nodes on a cluster: two pods train the tiny world over gloo, with their run in an object store.

The cluster has the CRDs of Kubeflow Trainer; `TrainerController` plays its controllers. Airflow's part is played by
`DeferredTask`, but for the last test. Stand-in without a cluster: tests/dags/trainjob.
"""

import asyncio
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from kubernetes.config import new_client_from_config

from components.config import RunConfig
from components.items.table import POPULARITY, write_item_table
from components.settings import Settings, get_settings
from tests.cluster.airflow import Airflow
from tests.cluster.trainer import TrainerController
from tests.cluster.world import HERE, STORE, Kubectl, is_ready, make_bucket, pause_until, write_kubeconfig
from tests.worlds import REPOSITORY, wait_until
from tests.worlds.deferral import DeferredTask, Store
from tests.worlds.tables import put
from tests.worlds.urm import *  # noqa: F403  # fixtures

pytestmark = pytest.mark.timeout(1200)

RUNTIME = REPOSITORY / "k8s" / "components" / "training" / "runtime.yaml"
IMAGE = "urm-pipeline:0.1.0"
RUN_ID = "two-nodes"
JOBSET = "jobset.sigs.k8s.io/jobset-name"
WORLD = "/world"  # where the pods have configuration and backbone
STEPS = 300
ROW = {"nodes": 2, "gpus": 0, "cpu": "100m", "memory": "2Gi", "ephemeral_storage": "1Gi", "shared_memory": "64Mi"}
# A DAG of this one task.
DAG = "two_nodes"
DAG_FILE = f"""
from airflow.sdk import dag
from dags.common.params import CONFIG, FORCE, OVERRIDES
from dags.common.tasks import stage_task

@dag(dag_id="{DAG}", schedule=None, params={{"config": CONFIG, "overrides": OVERRIDES, "force": FORCE}})
def two_nodes():
    task = stage_task("sft")
    task.poll_interval, task.logging_interval = 1, 3

two_nodes()
"""


@dataclass
class World:
    """What the tests use.

    Attributes:
        kubectl: In a namespace of its own, as administrator.
        controller: Trainer's part.
        lines: Lines of the task's log.
        make: A task `sft` with these columns of the table of pods, and these overrides.
    """

    kubectl: Kubectl
    controller: TrainerController
    lines: list[str]
    make: Callable[..., DeferredTask]

    def job(self) -> dict[str, Any]:
        """The one TrainJob."""
        (found,) = self.kubectl.read("trainjobs")["items"]
        return dict(found)

    def pods(self) -> dict[str, dict[str, Any]]:
        """Its pods by rank."""
        found = self.kubectl.read("pods", "--selector", "jobset.sigs.k8s.io/replicatedjob-name=node")["items"]
        return {pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"]: pod for pod in found}

    def said(self, text: str) -> bool:
        """Whether rank 0 or the operator has logged it."""
        return any(text in line for line in self.lines)


@pytest.fixture(scope="module")
def namespace(kubectl: Kubectl, backbone_dir: Path, config: RunConfig, tmp_path_factory: Any) -> Iterator[Kubectl]:
    """A namespace with an object store, the runtime, and what the pods mount."""
    if "trainjobs" not in kubectl("get", "crds", "--output", "name"):
        pytest.skip("the cluster has no CRDs of Kubeflow Trainer; k8s/README.md says how it gets them")
    own, folder = Kubectl(f"urm-test-{secrets.token_hex(3)}"), tmp_path_factory.mktemp("world")
    kubectl("create", "namespace", own.namespace)
    try:
        own("apply", "--server-side", "--filename", str(HERE / "s3.yaml"))
        small = {"max_steps": STEPS, "eval_steps": STEPS // 3, "backbone": WORLD}
        values = config.model_copy(update={"urm": config.urm.model_copy(update=small)}).model_dump(mode="json")
        (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
        files = [folder / "tiny.yaml", *backbone_dir.iterdir()]
        own("create", "configmap", "world", *[f"--from-file={path}" for path in files])
        settings = {
            "URM_CONFIGS_DIR": WORLD, "URM_HOME": "/cache/urm", "URM_DEVICE": "cpu", "URM_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1", "URM_RUNS_URI": f"{STORE}/runs",
        }  # fmt: skip
        own("create", "configmap", "urm-settings", *[f"--from-literal={key}={settings[key]}" for key in settings])
        own("create", "serviceaccount", "urm-training")
        wait_until(lambda: any(map(is_ready, own.pods("s3"))), 90)
        store = f"http://{own.address('s3')}:5000"
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        keys |= {"AWS_ENDPOINT_URL": store}
        own("create", "secret", "generic", "urm-training", *[f"--from-literal={key}={keys[key]}" for key in keys])
        own("apply", "--server-side", "--filename", "-", given=yaml.safe_dump(_make_runtime(own.namespace)))
        with pytest.MonkeyPatch.context() as patch:
            for key, value in keys.items():
                patch.setenv(key, value)
            make_bucket()
            yield own
    finally:
        kubectl("delete", "namespace", own.namespace, "--wait=false", "--ignore-not-found", fails=True)


def _make_runtime(namespace: str) -> dict[str, Any]:
    """Ours, in the namespace, and with the world mounted."""
    runtime: dict[str, Any] = yaml.safe_load(RUNTIME.read_text())
    runtime["metadata"]["namespace"] = namespace
    pod = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    pod["volumes"] = [{"name": "world", "configMap": {"name": "world"}}]
    pod["containers"][0]["volumeMounts"] = [{"name": "world", "mountPath": WORLD}]
    return runtime


@pytest.fixture
def inputs(namespace: Kubectl, tables: SimpleNamespace, tmp_path: Path) -> str:
    """The run directory of `RUN_ID` in the object store, with what `sft` reads."""
    return write_inputs(RUN_ID, tables, tmp_path)


def write_inputs(name: str, tables: SimpleNamespace, folder: Path) -> str:
    """Leave in a run directory in the object store what features and encode leave; returns its URI."""
    local, run_dir = folder / "run", f"{STORE}/runs/{name}"
    files = local / "files"
    files.mkdir(parents=True)
    trains = pc.equal(tables.examples["split"], "train")
    features = {
        "catalogue": tables.catalogue, "contexts": tables.contexts,
        "examples": tables.examples.filter(pc.invert(trains)), "recent_examples": tables.examples.filter(trains),
    }  # fmt: skip
    for name, table in features.items():
        pq.write_table(table, files / f"{name}.parquet")
    put(local, "features", {name: files / f"{name}.parquet" for name in features})
    rng, ids, num = np.random.default_rng(1), tables.item_ids, len(tables.item_ids)
    everyone = np.ones(num, bool)
    for name in ("item_table", "item_table_past"):
        roles = {role: (rng.normal(size=(num, 8)), everyone) for role in ("id", "id_history")}
        others = {"text": (rng.normal(size=(num, 12)), everyone), POPULARITY: (np.ones((num, 1)), everyone)}
        write_item_table(files / name, ids, roles | others)
    put(local, "encode", {name: files / name for name in ("item_table", "item_table_past")})
    for result in local.glob("*/result.json"):
        result.write_text(result.read_text().replace(str(local), run_dir))
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    if store.exists(run_dir):
        store.rm(run_dir, recursive=True)
    store.put(f"{local}/", f"{run_dir.removeprefix('s3://')}/", recursive=True)
    return run_dir


@pytest.fixture
def world(namespace: Kubectl, inputs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The controller runs; tasks write their log here."""
    from dags.common.tasks import stage_task
    from dags.common.train_job import StageTrainJobOperator

    monkeypatch.setenv("URM_RUNS_URI", f"{STORE}/runs")
    get_settings.cache_clear()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.Logger("task", logging.INFO)
    log.addHandler(handler)
    monkeypatch.setattr(StageTrainJobOperator, "log", log)

    def make(overrides: tuple[str, ...] = (), arguments: dict[str, Any] | None = None, **row: Any) -> DeferredTask:
        path = tmp_path / "pods.yaml"
        path.write_text(yaml.safe_dump({"sft": ROW | row}))
        settings = Settings(executor="kubernetes", image=IMAGE, namespace=namespace.namespace, pods_file=path)

        def make_operator() -> Any:
            operator = stage_task("sft", settings)
            for name, value in (
                {"poll_interval": 0.5, "logging_interval": 2, "minimum_wait": 0} | (arguments or {})
            ).items():
                setattr(operator, name, value)
            return operator

        ti = SimpleNamespace(dag_id="d", task_id="sft", run_id=RUN_ID, map_index=-1, xcom_push=lambda key, value: None)
        params = {"config": "tiny", "overrides": list(overrides), "force": False}
        context = {"ti": ti, "run_id": RUN_ID, "params": params, "dag": SimpleNamespace(dag_id="d")}
        return DeferredTask(make_operator, context | {"task_state_store": Store()})

    controller = TrainerController(new_client_from_config(), namespace.namespace)
    with controller.running():
        yield World(namespace, controller, lines, make)
        print("\n".join(lines))
        namespace("delete", "trainjobs", "--all", "--cascade=foreground")
    get_settings.cache_clear()


def step_until(task: DeferredTask, condition: Callable[[], object], seconds: float = 200) -> None:
    """Let the task go on until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition() and not task.ended:
        task.step(seconds)
        assert time.monotonic() < deadline


def checkpoints(run_dir: str) -> list[str]:
    """Complete checkpoints of the run in the store."""
    store = fsspec.filesystem("s3")
    store.invalidate_cache()
    return [str(path) for path in store.glob(f"{run_dir}/sft/.checkpoints-*/checkpoint-*/budget.json")]


def test_two_nodes_are_queued_admitted_preempted_resumed_and_train(world: World, inputs: str) -> None:
    task = world.make(kueue_queue="training")
    started = datetime.now(UTC)
    task.start()
    name = world.job()["metadata"]["name"]
    time.sleep(3)
    assert world.pods() == {}  # the queue has not admitted it
    world.controller.suspend(name, False)
    step_until(task, lambda: world.said("step="))
    pods = world.pods()
    assert sorted(pods) == ["0", "1"]
    first = [line for line in world.lines if line.startswith("[")]
    world.controller.suspend(name, True)
    step_until(task, lambda: world.said("it is suspended and waits for admission"))
    wait_until(lambda: not world.pods(), 150)
    assert checkpoints(inputs)
    world.controller.suspend(name, False)
    step_until(task, lambda: task.ended, 400)
    assert world.said("resuming")
    written = [line for line in world.lines if line.startswith("[")]
    assert written[: len(first)] == first and len(set(written)) > len(first)
    with fsspec.open(f"{inputs}/sft/result.json", "r") as stream:
        result = json.load(stream)
    assert result["metrics"]["training"]["steps"] == STEPS
    assert not checkpoints(inputs)
    assert world.kubectl.read("trainjobs")["items"] == []
    print(f"{datetime.now(UTC) - started}")


def test_an_evicted_node_costs_no_try(world: World, inputs: str) -> None:
    task = world.make()
    task.start()
    step_until(task, lambda: world.said("step="))
    name = world.pods()["1"]["metadata"]["name"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    path = f"/api/v1/namespaces/{world.kubectl.namespace}/pods/{name}/eviction"
    world.kubectl("create", "--raw", path, "--filename", "-", given=json.dumps(eviction))
    step_until(task, lambda: task.ended, 400)
    assert world.said("resuming")


def test_a_mistake_of_the_user_fails_at_once(world: World) -> None:
    task = world.make(overrides=("urm.history_length=0",))
    task.start()
    with pytest.raises(AirflowFailException, match=r"rank \d\).*exit code 2\n(.*\n)*.*history_length"):
        step_until(task, lambda: False)


def test_a_person_who_ends_the_task_ends_the_pods(world: World) -> None:
    task = world.make()
    task.start()
    step_until(task, lambda: len(world.pods()) == 2)
    asyncio.run(task.trigger.on_kill())
    wait_until(lambda: not world.pods() and not world.kubectl.read("trainjobs")["items"], 150)


def test_an_image_that_is_not_there_says_so(world: World) -> None:
    task = world.make(image="urm-pipeline:none", arguments={"startup_timeout": 5})
    task.start()
    with pytest.raises(
        AirflowException, match=r"did not start within 5 seconds: 0 of 2 pods run; .*(ErrImage|ImagePull)"
    ):
        step_until(task, lambda: False)
    wait_until(lambda: not world.kubectl.read("trainjobs")["items"], 150)


@pytest.fixture
def airflow(namespace: Kubectl, tmp_path: Path) -> Iterator[Airflow]:
    """An Airflow with its triggerer, which works as the service account `urm-airflow`."""
    rights = (REPOSITORY / "k8s" / "components" / "airflow" / "rights.yaml").read_text()
    own = namespace.namespace
    namespace(
        "apply", "--server-side", "--filename", "-", given=rights.replace("namespace: urm\n", f"namespace: {own}\n")
    )
    (tmp_path / "dags").mkdir()
    (tmp_path / "dags" / "two_nodes.py").write_text(DAG_FILE)
    (tmp_path / "pods.yaml").write_text(yaml.safe_dump({"sft": ROW | {"kueue_queue": "training"}}))
    found = Airflow(
        tmp_path / "airflow",
        {
            **{name: value for name, value in os.environ.items() if name.startswith("AWS_")},
            "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path / "dags"), "PYTHONPATH": str(REPOSITORY),
            "URM_EXECUTOR": "kubernetes", "URM_NAMESPACE": own, "URM_IMAGE": IMAGE, "URM_RUNS_URI": f"{STORE}/runs",
            "URM_PODS_FILE": str(tmp_path / "pods.yaml"),
            "KUBECONFIG": str(write_kubeconfig(namespace, "urm-airflow", tmp_path / "kubeconfig")),
        },
    )  # fmt: skip
    try:
        found.begin(DAG)
        yield found
    finally:
        found.end()


def test_airflow_follows_rank_0_through_preemption_and_a_killed_triggerer_until_a_person_ends_it(
    namespace: Kubectl, airflow: Airflow, tables: SimpleNamespace, tmp_path: Path
) -> None:
    client = airflow.client
    # It runs until a person ends it, however fast the machine is.
    budget = ["urm.max_steps=1000000", "urm.eval_steps=1000000", "urm.max_seconds=3000"]
    run_id = client.trigger(DAG, {"config": "tiny", "overrides": budget})
    inputs = write_inputs(Settings().run_dir(run_id).rpartition("/")[2], tables, tmp_path)

    def state() -> str | None:
        found: str | None = client.tasks(DAG, run_id)["sft"]["state"]
        return found

    def log() -> list[str]:
        return client.log_lines(DAG, run_id, "sft", tries)

    controller = TrainerController(new_client_from_config(), namespace.namespace)
    with controller.running():
        pause_until(lambda: state() == "deferred", 200)
        tries = client.tasks(DAG, run_id)["sft"]["try_number"]
        name = namespace.read("trainjobs")["items"][0]["metadata"]["name"]
        controller.suspend(name, False)
        pause_until(lambda: any("step=" in line for line in log()), 300)
        airflow.kill("airflow-triggerer")
        controller.suspend(name, True)
        airflow.start("airflow-triggerer")
        pause_until(lambda: any("waits for admission" in line for line in log()), 120)
        pause_until(lambda: not namespace.read("pods", "--selector", f"{JOBSET}={name}")["items"], 150)
        assert checkpoints(inputs)
        controller.suspend(name, False)
        pause_until(lambda: any("resuming" in line for line in log()), 300)
        pause_until(lambda: state() == "deferred" and client.tasks(DAG, run_id)["sft"]["triggerer_job"], 120)
        time.sleep(5)  # the triggerer begins; before that Airflow tells nobody
        client._send("PATCH", f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/sft", json={"new_state": "failed"})
        pause_until(lambda: not namespace.read("trainjobs")["items"], 200)
    print("\n".join(log()))
    assert client.tasks(DAG, run_id)["sft"]["try_number"] == tries
    said = [line for line in log() if "step=" in line]
    assert len(set(said)) == len(said)
    shown = client._send("GET", f"/dags/{DAG}/dagRuns/{run_id}/taskInstances/sft").json()["rendered_fields"]
    assert "components.torchrun" in str(shown["train_job"])
