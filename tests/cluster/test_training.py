"""Training as a person sees it on a cluster: every stage a pod, through a real Airflow, and what goes wrong meanwhile.

Stand-ins without a cluster: tests/dags, tests/e2e.
"""

import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from components.config import load_config
from components.recall.api.tokens import Scope, issue_token
from tests.cluster.airflow import TRAINING, Airflow, wait_slowly
from tests.cluster.world import PASSWORD, STORE, Kubectl, apply_base, is_ready, pause_until, store_variables, write_kubeconfig
from tests.worlds import CONFIGS, REPOSITORY, wait_until

pytestmark = pytest.mark.timeout(900)

HERE = Path(__file__).parent
CLASSES = ("data", "training", "tracking", "promotion")
EXAMPLES = {"max_train_contexts": 200, "max_validation_examples": 30, "max_test_examples": 60}
STEPS = {"urm.num_layers": 1, "urm.max_steps": 60, "urm.eval_steps": 20, "urm.max_seconds": 300, "items.id_max_steps": 10}
VALUES = {"source.max_users": 60, "baseline.max_epochs": 1, "baseline.max_seconds": 10} | STEPS
VALUES |= {f"features.{name}": number for name, number in EXAMPLES.items()} | {"evaluation.bootstrap_samples": 100}
SMALL = [f"{name}={value}" for name, value in VALUES.items()]
PODS = {"defaults": {"cpu": "100m", "memory": "3Gi", "gpus": 0, "image": "urm-pipeline:0.1.0"}}


@dataclass
class Training:
    """What the tests use.

    Attributes:
        kubectl: In the namespace of the pods, as administrator.
        airflow: Works as the service account `urm-airflow`.
        pods_file: Table of the pods.
    """

    kubectl: Kubectl
    airflow: Airflow
    pods_file: Path

    def change_pods(self, **rows: dict[str, Any]) -> None:
        """Other rows of the table."""
        self.pods_file.write_text(yaml.safe_dump(PODS | rows))

    def pods(self, stage: str = "sft") -> list[dict[str, Any]]:
        """Pods of a stage, ended ones among them."""
        return self.kubectl.read("pods", "--selector", f"app.kubernetes.io/component={stage}")["items"]


@pytest.fixture(scope="module")
def training(kubectl: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    """A namespace with object store, MLflow and recall service, and an Airflow on this machine."""
    home = tmp_path_factory.mktemp("airflow")
    config = load_config(CONFIGS / "complete_journey.yaml")
    settings = {
        "URM_MLFLOW_URI": "http://mlflow:5000", "URM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1",
        "URM_CHECKPOINT_MINUTES": "0.1",
    }  # fmt: skip
    with apply_base(home, config, settings) as namespace, pytest.MonkeyPatch.context() as patch:
        # The recall service comes with the promotion: its start would take the processors that the others need.
        namespace("scale", "deployment", "--all", "--replicas=0")
        namespace("apply", "--server-side", "--filename", str(HERE / "mlflow.yaml"))
        own = store_variables(f"http://{namespace.address('s3')}:5000")
        for key, text in own.items():
            patch.setenv(key, text)
        fsspec.filesystem("s3").mkdir("urm")
        write_secrets(namespace, home, own)
        pause_until(lambda: any(map(is_ready, namespace.pods("mlflow"))), 240)
        pods_file = home / "pods.yaml"
        pods_file.write_text(yaml.safe_dump(PODS))
        own |= {
            "URM_EXECUTOR": "kubernetes", "URM_NAMESPACE": namespace.namespace, "URM_IMAGE": "urm-pipeline:0.1.0",
            "URM_RUNS_URI": f"{STORE}/runs", "URM_PODS_FILE": str(pods_file),
            "URM_MLFLOW_URI": f"http://{namespace.address('mlflow')}:5000",
            "KUBECONFIG": str(write_kubeconfig(namespace, "urm-airflow", home / "kubeconfig")),
        }  # fmt: skip
        airflow = Airflow(home / "airflow", own)
        try:
            airflow.begin()
            yield Training(namespace, airflow, pods_file)
        finally:
            airflow.end()


def write_secrets(namespace: Kubectl, home: Path, store: dict[str, str]) -> None:
    """One secret per class of stages, and those of the recall service."""
    redis = f"redis://urm:{PASSWORD}@redis:6379/0"
    tokens = home / "tokens.json"
    token = issue_token(tokens, "tests", [Scope.READ, Scope.WRITE, Scope.ASK])
    more = {"promotion": {"URM_REDIS_URL": redis, "URM_API_TOKEN": token}}
    found = {f"urm-{name}": store | more.get(name, {}) for name in CLASSES}
    found["urm-credentials"] = store | {"URM_REDIS_URL": redis}
    for name, values in found.items():
        namespace("create", "secret", "generic", name, *[f"--from-literal={key}={values[key]}" for key in values])
    namespace("create", "secret", "generic", "recall-tokens", f"--from-file=tokens.json={tokens}")


@pytest.fixture(scope="module")
def whole_run(training: Training) -> str:
    """Id of a run of `recall_training` that has ended; every stage computes, and the gate lets everything pass."""
    conf = {"overrides": SMALL, "force": True, "promote_anyway": True}
    run_id = training.airflow.client.trigger(TRAINING, conf)
    wait_slowly(lambda: training.airflow.run(TRAINING, run_id)["state"] in ("success", "failed"), 800)
    return run_id


def test_every_stage_is_a_pod_and_all_succeed(training: Training, whole_run: str) -> None:
    states = {name: task["state"] for name, task in training.airflow.client.tasks(TRAINING, whole_run).items()}
    print(states)
    assert set(states.values()) == {"success"}
