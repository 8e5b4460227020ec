"""Turns `urm` commands into a mapped Airflow task: local processes, or pods of a Kubernetes cluster."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import XComArg
from airflow.sdk.definitions.mappedoperator import MappedOperator

from components.settings import Settings, get_settings
from dags.task_factory import OWNER, POOL, PROFILES, RETRY_POLICY, pod_arguments


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

    pod = pod_arguments(common["task_id"], PROFILES["sft"], common["execution_timeout"], settings)
    return KubernetesPodOperator.partial(**common, **pod, do_xcom_push=False).expand(arguments=commands)
