"""Turns `urm` commands into a mapped Airflow task: local processes, or pods of a Kubernetes cluster."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from airflow.sdk import XComArg
from airflow.sdk.definitions.mappedoperator import MappedOperator

from components.settings import Settings, get_settings
from dags.task_factory import OWNER, POOL, RETRY_POLICY, StageProfile, pod_arguments


def command_tasks(
    task_id: str,
    commands: XComArg,
    *,
    doc: str,
    timeout: timedelta,
    size: StageProfile,
    settings: Settings | None = None,
) -> MappedOperator:
    """One task a command, each in a slot of the pool `compute`.

    Args:
        task_id: Name of the mapped task.
        commands: A list of argument lists of `urm`, known when the DAG runs.
        doc: Shown on the task's page.
        timeout: Longest run of one command.
        size: What its pod asks for.
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
        return _pod_tasks(common, commands, size, settings)
    from dags.stage_process import CommandProcessOperator

    return CommandProcessOperator.partial(**common).expand(arguments=commands)


def _pod_tasks(common: dict[str, Any], commands: XComArg, size: StageProfile, settings: Settings) -> MappedOperator:
    from dags.stage_pod import UrmPodOperator

    pod = pod_arguments(common["task_id"], size, common["execution_timeout"], settings)
    return UrmPodOperator.partial(**common, **pod, deferrable=True).expand(arguments=commands)
