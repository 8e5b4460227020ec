"""Turns `urm` commands into a mapped Airflow task: local processes, or pods of a Kubernetes cluster."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import XComArg
from airflow.sdk.definitions.mappedoperator import MappedOperator

from components.settings import Settings, get_settings
from dags.task_factory import OWNER, POD_TEMPLATE, POOL, PROFILES, RETRY_POLICY


def command_tasks(
    task_id: str, commands: XComArg, *, doc: str, timeout: timedelta, settings: Settings | None = None
) -> MappedOperator:
    """One task a command, each in a slot of the pool `compute`.

    Args:
        task_id: Name of the mapped task.
        commands: A list of argument lists of `urm`, known when the DAG runs.
        doc: Shown on the task's page.
        timeout: Longest run of one command.
        settings: Where they run; by default read from the environment.
    """
    settings = settings or get_settings()
    common: dict[str, Any] = {
        "task_id": task_id,
        "owner": OWNER,
        "doc_md": doc,
        "execution_timeout": timeout,
        "pool": POOL,
        **RETRY_POLICY,
    }
    if settings.executor == "kubernetes":
        return _pod_tasks(common, commands, settings)
    from dags.stage_process import CommandProcessOperator

    return CommandProcessOperator.partial(**common).expand(arguments=commands)


def _pod_tasks(common: dict[str, Any], commands: XComArg, settings: Settings) -> MappedOperator:
    """Pods of the size that `sft` asks for, since most commands train."""
    from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
    from kubernetes.client import models as k8s

    profile = PROFILES["sft"]
    limits = {"memory": profile.memory, "nvidia.com/gpu": str(profile.gpus)}
    return KubernetesPodOperator.partial(
        **common,
        name=f"urm-{common['task_id']}",
        namespace=settings.namespace,
        image=settings.image,
        cmds=["urm"],
        pod_template_file=str(POD_TEMPLATE),
        container_resources=k8s.V1ResourceRequirements(
            requests={"cpu": profile.cpu, "memory": profile.memory}, limits=limits
        ),
        labels={"app.kubernetes.io/component": common["task_id"]},
        active_deadline_seconds=int(common["execution_timeout"].total_seconds()),
        do_xcom_push=False,
        on_finish_action="delete_succeeded_pod",
        termination_message_policy="FallbackToLogsOnError",
        startup_timeout_seconds=600,
    ).expand(arguments=commands)
