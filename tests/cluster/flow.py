"""The flow as a person runs it on a cluster: every stage a pod, started by a real Airflow beside the cluster."""

import json
import re
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from components.config import load_config
from components.recall.api.tokens import Scope, issue_token
from components.settings import Settings
from tests.cluster.airflow import ENDED, TRAINING, Airflow
from tests.cluster.world import (
    AD_HOC,
    PASSWORD,
    STORE,
    WORKER,
    Kubectl,
    Object,
    apply_base,
    is_ready,
    make_bucket,
    pause_until,
    store_variables,
    write_kubeconfig,
)
from tests.worlds import CONFIGS, REPOSITORY

HERE = Path(__file__).parent
ROLLOUT_SECONDS = 400  # the pods of one machine share its cores with this test
CLASSES = ("data", "training", "tracking", "promotion")
EXAMPLES = {"max_train_contexts": 200, "max_validation_examples": 30, "max_test_examples": 60}
STEPS = {"urm.num_layers": 1, "urm.max_seconds": 2000, "urm.eval_steps": 20, "items.id_max_steps": 10}
VALUES = {"source.max_users": 30, "baseline.max_epochs": 1, "baseline.max_seconds": 10} | STEPS
VALUES |= {f"features.{name}": number for name, number in EXAMPLES.items()} | {"evaluation.bootstrap_samples": 400}
VALUES |= {"release.promote_timeout_seconds": ROLLOUT_SECONDS}
SMALL = [f"{name}={value}" for name, value in VALUES.items()]
PODS = {"defaults": {"cpu": "200m", "memory": "3Gi", "ephemeral_storage": "4Gi", "gpus": 0}}
OURS = "app.kubernetes.io/name=urm,app.kubernetes.io/managed-by=airflow"


@dataclass
class Training:
    """What the tests use.

    Attributes:
        kubectl: In the namespace of the pods, as administrator.
        airflow: Works as the service account `urm-airflow`.
        pods_file: Table of the pods.
        token: Of the recall service's API.
        found: ConfigMaps and secrets before the first run.
    """

    kubectl: Kubectl
    airflow: Airflow
    pods_file: Path
    token: str = ""
    found: set[str] = field(default_factory=set)

    def change_pods(self, **rows: Object) -> None:
        """Write a table with these rows beside the defaults."""
        self.pods_file.write_text(yaml.safe_dump(PODS | rows))

    def pods(self, stage: str = "") -> list[Object]:
        """Pods that Airflow started, of one stage or of all, those that have ended among them."""
        selector = f"{OURS},app.kubernetes.io/component={stage}" if stage else OURS
        return list(self.kubectl.read("pods", "--selector", selector)["items"])

    def started(self, stage: str) -> set[str]:
        """Names of all pods of a stage that have come to a node so far."""
        events = self.kubectl.read("events", "--field-selector", "reason=Scheduled")["items"]
        return {name for one in events if (name := one["involvedObject"]["name"]).startswith(f"urm-{stage}-")}

    def run_dir(self, run_id: str) -> str:
        """Address of a run's folder."""
        return Settings(runs_uri=f"{STORE}/runs").run_dir(run_id)

    def result(self, run_id: str, stage: str) -> Object:
        """Content of a stage's result.json."""
        with fsspec.open(f"{self.run_dir(run_id)}/{stage}/result.json") as stream:
            content: Object = json.load(stream)
        return content

    def saved_steps(self, run_id: str) -> list[int]:
        """Steps of the complete checkpoints of a run's `sft`."""
        store = fsspec.filesystem("s3")
        store.invalidate_cache()
        found = store.glob(f"{self.run_dir(run_id)}/sft/.checkpoints-*/checkpoint-*/budget.json")
        return sorted(int(path.split("/")[-2].removeprefix("checkpoint-")) for path in found)

    def wait_for_pod(self, stage: str = "sft", other_than: Collection[str] = (), seconds: float = 240) -> Object:
        """A running pod of the stage."""
        found: list[Object] = []

        def runs() -> bool:
            alive = [pod for pod in self.pods(stage) if "deletionTimestamp" not in pod["metadata"]]
            found[:] = [
                pod for pod in alive
                if pod["status"]["phase"] == "Running" and pod["metadata"]["name"] not in other_than
            ]  # fmt: skip
            return bool(found)

        pause_until(runs, seconds)
        return found[0]

    def begin(self, run_id: str, **row: Any) -> tuple[str, int]:
        """Clear `sft` with this row of the table, and wait until it trains; name of its pod, and number of its try."""
        tries = self.clear(run_id, **row)
        pod = self.wait_for_pod()["metadata"]["name"]
        pause_until(lambda: "training URM" in self.kubectl("logs", pod, fails=True), 240)
        return pod, tries + 1

    def clear(self, run_id: str, task_id: str = "sft", **row: Any) -> int:
        """Clear a task, with this row of the table, once no run is at work; the number of its last try."""
        self.wait_until_idle(run_id)
        tries: int = self.airflow.task(run_id, task_id)["try_number"]
        self.change_pods(**{task_id: row})
        self.airflow.clear(run_id, task_id)
        return tries

    def wait_until_idle(self, run_id: str) -> None:
        """End other runs, behind which this one would wait, and wait for the end of this one.

        A scheduler that is about to end a run overwrites what a clearing of that moment has set.
        """
        for other in set(self.airflow.client.active_runs(TRAINING)) - {run_id}:
            self.airflow.end_run(TRAINING, other)
            self.wait_until_gone()
        pause_until(lambda: self.airflow.run(TRAINING, run_id)["state"] in ENDED, 60)

    def wait_until_gone(self, *stages: str, seconds: float = 150) -> None:
        """Return once no pod of the stages, or of any, is left."""
        pause_until(lambda: not [pod for stage in stages or ("",) for pod in self.pods(stage)], seconds)

    def resumed_step(self, pod: str) -> int:
        """Step at which a pod has gone on with the training."""
        pattern = r"resuming +checkpoint=checkpoint-(\d+)"
        pause_until(lambda: re.search(pattern, self.kubectl("logs", pod, fails=True)), 240)
        (step,) = re.findall(pattern, self.kubectl("logs", pod))[:1]
        return int(step)


@contextmanager
def open_flow(home: Path, engine: dict[str, str] | None = None, **more: Any) -> Iterator[Training]:
    """A namespace with object store, MLflow and recall service, and an Airflow on this machine.

    `engine` are variables of Airflow that the stages' engine needs; `more` goes to `apply_base`.
    """
    (home / "temporary").mkdir()
    config = load_config(CONFIGS / "complete_journey.yaml")
    settings = {
        "URM_MLFLOW_URI": "http://mlflow:5000", "URM_API_URL": "http://recall-api:8000", "URM_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1", "URM_CHECKPOINT_MINUTES": "0.1", "URM_CACHE_URI": f"{STORE}/cache",
    }  # fmt: skip
    with apply_base(home, config, settings, **more) as namespace, pytest.MonkeyPatch.context() as patch:
        # The recall service comes with the promotion: its start would take the processors that the others need.
        namespace("scale", "deployment", "--all", "--replicas=0")
        for deployment in (WORKER, AD_HOC):
            longer = json.dumps({"spec": {"progressDeadlineSeconds": ROLLOUT_SECONDS}})
            namespace("patch", "deployment", deployment, "--patch", longer)
        namespace("apply", "--server-side", "--filename", str(HERE / "mlflow.yaml"))
        own = store_variables(f"http://{namespace.address('s3')}:5000")
        for key, text in own.items():
            patch.setenv(key, text)
        make_bucket()
        token = issue_token(home / "tokens.json", "tests", [Scope.READ, Scope.WRITE, Scope.ASK])
        write_secrets(namespace, home, own, token)
        pause_until(lambda: any(map(is_ready, namespace.pods("mlflow"))), 240)
        own |= {
            "URM_EXECUTOR": "kubernetes", "URM_NAMESPACE": namespace.namespace, "URM_IMAGE": "urm-pipeline:0.1.0",
            "URM_RUNS_URI": f"{STORE}/runs", "URM_PODS_FILE": str(home / "pods.yaml"),
            "URM_MLFLOW_URI": f"http://{namespace.address('mlflow')}:5000",
            "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(home / "temporary"),
            "KUBECONFIG": str(write_kubeconfig(namespace, "urm-airflow", home / "kubeconfig")),
        }  # fmt: skip
        airflow = Airflow(home / "airflow", own | (engine or {}))
        made = Training(namespace, airflow, home / "pods.yaml", token)
        made.change_pods()
        made.found = list_objects(namespace)
        try:
            airflow.begin()
            yield made
        finally:
            airflow.end()


def write_secrets(namespace: Kubectl, home: Path, store: dict[str, str], token: str) -> None:
    """One secret per class of stages, and those of the recall service."""
    redis = f"redis://urm:{PASSWORD}@redis:6379/0"
    more = {"promotion": {"URM_REDIS_URL": redis, "URM_API_TOKEN": token}}
    found = {f"urm-{name}": store | more.get(name, {}) for name in CLASSES}
    found["urm-credentials"] = store | {"URM_REDIS_URL": redis}
    for name, values in found.items():
        create_secret(namespace, name, values)
    namespace("create", "secret", "generic", "recall-tokens", f"--from-file=tokens.json={home / 'tokens.json'}")


def create_secret(namespace: Kubectl, name: str, values: dict[str, str]) -> None:
    """Make or replace a secret."""
    namespace("delete", "secret", name, "--ignore-not-found")
    namespace("create", "secret", "generic", name, *[f"--from-literal={key}={values[key]}" for key in values])


def list_objects(namespace: Kubectl) -> set[str]:
    """Names of what a run might leave in the cluster beside pods."""
    return set(namespace("get", "configmaps,secrets,jobs,persistentvolumeclaims", "--output", "name").split())


def record(case: str, happened: str, start: float, retries: int | str = 0, resumed: object = "–") -> None:
    """Print a row of the table in docs/results/kubernetes.md."""
    print(f"\n| {case} | {happened} | {time.monotonic() - start:.0f} | {retries} | {resumed} |", flush=True)


def sentence(training: Training, run_id: str, task_id: str, try_number: int) -> str:
    """The sentence in the task's log that names subject, expected, got and remedy."""
    lines = training.airflow.log(run_id, task_id, try_number).splitlines()
    found = [line for line in lines if "expected" in line and ", got " in line]
    assert found, "\n".join(lines[-40:])
    return found[-1].strip()
