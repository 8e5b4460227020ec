"""The TrainJob of `sft` on several nodes, as it would be submitted, and what becomes of its task."""

import json
from types import SimpleNamespace

import pytest
import yaml

from components.exceptions import ConfigError
from components.settings import Settings
from tests.worlds import REPOSITORY
from tests.worlds.trainer import trainer

__all__ = ["trainer"]

ROW = {
    "nodes": 2,
    "gpus": 4,
    "cpu": "16",
    "memory": "128Gi",
    "ephemeral_storage": "100Gi",
    "shared_memory": "16Gi",
    "hours": 24,
    "queue_hours": 48,
    "disruptions": 3,
    "cache_claim": "urm-cache",
    "node_selector": {"gpu": "h100"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "kueue_queue": "gpus",
    "priority_class": "high",
}
RUNTIME = yaml.safe_load((REPOSITORY / "k8s" / "components" / "training" / "runtime.yaml").read_text())


@pytest.fixture
def make_task(home, tmp_path, monkeypatch):
    """The task `sft` of a table with this row."""
    monkeypatch.setenv("URM_RUNS_URI", str(tmp_path / "runs"))

    def make(**row):
        from dags.common.tasks import stage_task

        path = tmp_path / "pods.yaml"
        path.write_text(yaml.safe_dump({"sft": ROW | row}))
        return stage_task("sft", Settings(executor="kubernetes", image="urm:1", namespace="training", pods_file=path))

    return make


def test_what_is_submitted(make_task, render):
    task, _ = render(make_task(), overrides=["urm.max_steps=5"])
    job = task.train_job
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert spec["suspend"] is True  # for Kueue to admit it
    assert spec["runtimeRef"]["name"] == RUNTIME["metadata"]["name"]
    command = " ".join([*trainer["command"], *trainer["args"]])
    waits = "--rdzv-conf timeout=1800 --shutdown-timeout 100"
    assert command.startswith(f"python -m components.torchrun {waits} -m components sft --config ")
    assert command.endswith("--set urm.max_steps=5")
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["image"]) == (2, 4, "urm:1")
    shared = {"memory": "128Gi", "ephemeral-storage": "100Gi", "nvidia.com/gpu": "4"}
    assert trainer["resourcesPerNode"] == {"requests": {"cpu": "16", **shared}, "limits": shared}
    assert {"name": "URM_DEVICE", "value": "cuda"} in trainer["env"]
    (node,) = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert {volume["name"]: next(iter(set(volume) - {"name"})) for volume in pod["volumes"]} == {
        "cache": "persistentVolumeClaim",
        "tmp": "emptyDir",
        "shared-memory": "emptyDir",
    }
    assert (pod["nodeSelector"], pod["tolerations"][0]["key"]) == ({"gpu": "h100"}, "nvidia.com/gpu")
    assert (task.queue_timeout, task.active_deadline_seconds, task.disruptions) == (48 * 3600, 24 * 3600, 3)
    assert task.execution_timeout is None
    assert json.dumps(job)  # what the tab *Rendered Templates* shows


def test_without_a_queue_it_starts_at_once(make_task, render):
    task, _ = render(make_task(kueue_queue=None, priority_class=None))
    assert task.train_job["spec"]["suspend"] is False


def test_a_priority_that_trainer_cannot_give_is_refused(make_task):
    with pytest.raises(ConfigError, match=r"sft\.priority_class: expected none, since Trainer .*got 'high'"):
        make_task(kueue_queue=None)


def test_one_node_is_a_pod(make_task):
    from dags.common.pod import StagePodOperator

    assert isinstance(make_task(nodes=1), StagePodOperator)


def test_its_nodes_are_the_pod_of_a_stage():
    """The runtime says what the template of a stage's pod says, in Trainer's words."""
    (replicated,) = RUNTIME["spec"]["template"]["spec"]["replicatedJobs"]
    ours = replicated["template"]["spec"]["template"]["spec"]
    pod = yaml.safe_load((REPOSITORY / "k8s" / "jobs" / "stage-pod.yaml").read_text())["spec"]
    (node,), (base,) = ours.pop("containers"), pod.pop("containers")
    assert ours == {
        **{key: value for key, value in pod.items() if key != "volumes"},
        "serviceAccountName": "urm-training",
        "shareProcessNamespace": True,
    }
    secret = {"secretRef": {"name": "urm-training"}}
    assert node == {
        **{key: value for key, value in base.items() if key != "volumeMounts"},
        "name": "node",
        "envFrom": [*base["envFrom"], secret],
    }


@pytest.fixture
def run_task(make_task, render, trainer, monkeypatch):
    """Run the task in a worker while `act` plays the cluster; returns its XComs."""

    def execute(act):
        task, context = render(make_task(kueue_queue=None, priority_class=None, gpus=0))
        pushed, answered = {}, trainer.answer
        ti = {"dag_id": "d", "xcom_push": lambda key, value: pushed.update({key: value})}
        context["ti"] = SimpleNamespace(**vars(context["ti"]), **ti)
        task.deferrable, task.poll_interval = False, 0.01

        def answer(method, *arguments):
            found = answered(method, *arguments)
            if method == "POST":
                act()
            return found

        monkeypatch.setattr(trainer, "answer", answer)
        task.execute(context)
        return pushed

    return execute


def test_success_is_a_result(run_task, trainer, tmp_path):
    from airflow.sdk.exceptions import AirflowException

    def act():
        for pod in trainer.start():
            trainer.end_pod(pod, 0)
        trainer.end("Complete")

    with pytest.raises(AirflowException, match=r"stage sft: expected .*/sft/result.json, got nothing"):
        run_task(act)
    result = tmp_path / "runs" / "manual__2026-11-25T10-00-00-00-00" / "sft" / "result.json"
    result.parent.mkdir(parents=True)
    result.write_text(json.dumps({"metrics": {"steps": 3}, "seconds": 1, "counts": {}, "outputs": {}}))
    assert run_task(act)["summary"]["metrics"] == {"steps": 3}


def test_too_little_memory_names_the_table(run_task, trainer):
    from airflow.sdk.exceptions import AirflowException

    def act():
        trainer.end_pod(trainer.start()[1], 137, "OOMKilled")
        trainer.end("Failed")

    with pytest.raises(AirflowException, match=r"rank 1\).*\(OOMKilled\); raise `memory` of sft in the table of pods"):
        run_task(act)
