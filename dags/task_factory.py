"""Turns the name of a stage into an Airflow task: a local process, or a pod of a Kubernetes cluster.

`URM_EXECUTOR` chooses (`local` or `kubernetes`); the graph of a DAG is the same in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator

from components.settings import Settings, get_settings

POOL = "compute"  # one slot on one machine: heavy stages never share its cores
OWNER = "recommendation"
POD_TEMPLATE = Path(__file__).parent.parent / "k8s" / "jobs" / "stage-pod.yaml"


@dataclass(frozen=True)
class StageProfile:
    """What a stage needs from the machine that runs it.

    Attributes:
        doc: Shown on the task's page.
        timeout: Longest run; then the process or pod is ended and tried again.
        heavy: Whether it takes a slot of the pool `compute`.
        cpu: Cores requested of Kubernetes.
        memory: Memory requested of, and limited by, Kubernetes.
        gpus: GPUs of its pod.
    """

    doc: str
    timeout: timedelta
    heavy: bool = True
    cpu: str = "2"
    memory: str = "8Gi"
    gpus: int = 0


PROFILES: dict[str, StageProfile] = {
    "ingest": StageProfile(
        "Raw logs → the canonical tables `events` and `items`. A missing column or file ends the run at once.",
        timedelta(hours=2),
    ),
    "validate": StageProfile(
        "Great Expectations over both tables. Bad rows go to the quarantine with a reason; too large a share of them "
        "ends the run with a sentence that names the rule, the share and the limit.",
        timedelta(hours=1),
    ),
    "features": StageProfile(
        "Behaviour sequences as Feast feature views, and task examples by point-in-time retrieval.",
        timedelta(hours=3),
        memory="16Gi",
    ),
    "encode": StageProfile(
        "Frozen text and image vectors of every item, as a memory-mapped item table. Where the cache "
        "is kept, only new texts are encoded.",
        timedelta(hours=3),
    ),
    "baseline": StageProfile(
        "Popularity, own history, item-kNN and the target-attention network, with their predictions on the test "
        "examples. The network's item vectors become URM's ID vectors.",
        timedelta(hours=4),
    ),
    "sft": StageProfile(
        "Full-parameter SFT of the universal recommendation model. A retry on the same disk resumes from the last "
        "checkpoint; a pod has a disk of its own and starts again.",
        timedelta(hours=12),
        cpu="8",
        memory="64Gi",
        gpus=1,
    ),
    "evaluate": StageProfile(
        "Recall per task on the full catalogue, every model against target attention with a paired bootstrap interval.",
        timedelta(hours=2),
        memory="16Gi",
    ),
    "gate": StageProfile(
        "Pass or fail by the policy in the configuration. A failure skips release and promote unless the run was "
        "triggered with *promote_anyway*; the reasons stand in this task's log and in the notes of task and run.",
        timedelta(minutes=10),
        heavy=False,
        cpu="500m",
        memory="2Gi",
    ),
    "release": StageProfile(
        "Model, item table, index and tasks as one bundle under one manifest; registered in MLflow as `candidate`.",
        timedelta(hours=2),  # builds the candidate index: minutes and gigabytes from a million items on
        memory="16Gi",
    ),
    "promote": StageProfile(
        "The recall workers load the release beside the serving one, smoke-check it and flip, or reject it with a "
        "reason. The aliases `champion` and `previous` move only after the flip.",
        timedelta(minutes=30),
        heavy=False,
        cpu="500m",
        memory="2Gi",
    ),
}

# Transient faults (a service away, a process or pod killed) are tried again; a mistake in the input is not.
RETRY_POLICY: dict[str, Any] = {
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=5),
}


def stage_task(stage: str, settings: Settings | None = None) -> BaseOperator:
    """The task of a stage; its id is the stage's name.

    Args:
        stage: A key of PROFILES.
        settings: Where it runs; by default read from the environment.
    """
    settings = settings or get_settings()
    profile = PROFILES[stage]
    common: dict[str, Any] = {
        "task_id": stage,
        "stage": stage,
        "owner": OWNER,
        "doc_md": profile.doc,
        "execution_timeout": profile.timeout,
        **RETRY_POLICY,
    }
    if profile.heavy:
        common["pool"] = POOL
    if settings.executor == "kubernetes":
        return _pod_task(profile, settings, common)
    from dags.stage_process import StageProcessOperator

    return StageProcessOperator(**common)


def _pod_task(profile: StageProfile, settings: Settings, common: dict[str, Any]) -> BaseOperator:
    """A pod from the template."""
    from dags.stage_pod import StagePodOperator

    return StagePodOperator(
        **common,
        **pod_arguments(common["stage"], profile, profile.timeout, settings),
        deferrable=profile.timeout > timedelta(minutes=30),
        log_pod_spec_on_failure=False,
    )


def pod_arguments(task_id: str, profile: StageProfile, timeout: timedelta, settings: Settings) -> dict[str, Any]:
    """What every pod of ours has, as arguments of KubernetesPodOperator; the client is imported only where used."""
    from kubernetes.client import models as k8s

    limits = {"memory": profile.memory} | ({"nvidia.com/gpu": str(profile.gpus)} if profile.gpus else {})
    return {
        "name": f"urm-{task_id}",
        "namespace": settings.namespace,
        "image": settings.image,
        "cmds": ["urm"],
        "pod_template_file": str(POD_TEMPLATE),
        "container_resources": k8s.V1ResourceRequirements(
            requests={"cpu": profile.cpu, "memory": profile.memory}, limits=limits
        ),
        "labels": {"app.kubernetes.io/component": task_id},
        "active_deadline_seconds": int(timeout.total_seconds()),  # a pod whose task is gone ends by itself
        "on_finish_action": "delete_succeeded_pod",
        "termination_message_policy": "FallbackToLogsOnError",
        "startup_timeout_seconds": 600,
    }
