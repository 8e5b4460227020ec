"""Turns rows of the flow, or `urm` commands, into Airflow tasks: local processes, or pods of a Kubernetes cluster.

`URM_EXECUTOR` chooses (`local` or `kubernetes`); the graph of a DAG is the same in both.
"""

from collections.abc import Callable, Collection
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Context, Param, XComArg

from components.flow import FLOWS, STAGES, Resources, direct_inputs
from components.settings import Settings, get_settings
from dags.common.params import link_variables

POOL = "compute"  # one slot on one machine: heavy stages never share its cores
OWNER = "recommendation"
PROMOTERS = ("promote", "rollback")  # their pods may change the Deployments of the recall service
POD_TEMPLATE = Path(__file__).parents[2] / "k8s" / "jobs" / "stage-pod.yaml"

# Transient faults (a service away, a process or pod killed) are tried again; a mistake in the input is not.
RETRY_POLICY: dict[str, Any] = {
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=5),
}


def stage_task(stage: str, settings: Settings | None = None) -> BaseOperator:
    """The task of a stage; its id is the stage's name. Settings are by default read from the environment."""
    settings, spec = settings or get_settings(), STAGES[stage]
    common: dict[str, Any] = {"stage": stage, **_common(stage, f"{spec.summary} {spec.notes}".strip(), spec.resources)}
    if settings.executor == "kubernetes":
        from dags.common.pod import StagePodOperator

        return StagePodOperator(
            **common,
            **pod_arguments(stage, spec.resources, settings),
            deferrable=spec.resources.hours > 0.5,
            log_pod_spec_on_failure=False,
        )
    from dags.common.process import StageProcessOperator

    return StageProcessOperator(**common)


def stage_tasks(flow: str) -> dict[str, BaseOperator]:
    """The tasks of a flow with its arrows: a stage follows those of its inputs that no other input implies."""
    tasks = {stage: stage_task(stage) for stage in FLOWS[flow]}
    for stage, task in tasks.items():
        for earlier in direct_inputs(stage, tasks):
            tasks[earlier] >> task
    return tasks


def describe_stages(flow: str) -> str:
    """Numbered list of a flow's stages, in Markdown."""
    return "\n".join(
        f"{number}. **{name}**: {STAGES[name].summary}" for number, name in enumerate(FLOWS[flow], start=1)
    )


def flag_params(flow: str) -> dict[str, Param]:
    """A form field per flag of a flow's stages."""
    flags = {name: text for stage in FLOWS[flow] for name, text in STAGES[stage].flags.items()}
    return {
        name: Param(False, type="boolean", title=name.replace("_", " ").capitalize(), description=text)
        for name, text in flags.items()
    }


def command_tasks(
    task_id: str, commands: XComArg, *, doc: str, resources: Resources, settings: Settings | None = None
) -> XComArg:
    """One task per command, each in a slot of the pool `compute`; returns what `chain` takes.

    The commands, argument lists of `urm`, are known when the DAG runs. `doc` is shown on the task's page; resources are
    those of one command. Settings are by default read from the environment.
    """
    settings = settings or get_settings()
    common = _common(task_id, doc, resources)
    if settings.executor == "kubernetes":
        from dags.common.pod import UrmPodOperator

        pod = pod_arguments(task_id, resources, settings)
        return UrmPodOperator.partial(**common, **pod, deferrable=True).expand(arguments=commands).output
    from dags.common.process import UrmProcessOperator

    return UrmProcessOperator.partial(**common, credentials=["mlflow"]).expand(arguments=commands).output


def command_task(
    task_id: str,
    arguments: Callable[..., list[str]],
    *,
    doc: str,
    resources: Resources,
    credentials: Collection[str],
    settings: Settings | None = None,
) -> BaseOperator:
    """The task of one `urm` command that no retry repeats, since a command may go from where it stands.

    `arguments` gives them from the context of a DAG run; `credentials` are the services whose it needs as a process.
    """
    settings = settings or get_settings()
    common = _common(task_id, doc, resources) | {"retries": 0}
    if settings.executor == "kubernetes":
        from dags.common.pod import UrmPodOperator

        return UrmPodOperator(**common, **pod_arguments(task_id, resources, settings), arguments=arguments)
    from dags.common.process import UrmProcessOperator

    return UrmProcessOperator(**common, credentials=credentials, arguments=arguments)


def _common(task_id: str, doc: str, resources: Resources) -> dict[str, Any]:
    """Arguments that every operator of ours has."""
    pool = {"pool": POOL} if resources.pool else {}
    timeout = timedelta(hours=resources.hours)
    return {"task_id": task_id, "owner": OWNER, "doc_md": doc, "execution_timeout": timeout, **pool, **RETRY_POLICY}


def _pod_variables(gpus: int, context: Context, jinja_env: Any = None) -> dict[str, str]:
    """Variables that a pod gets beside those of the cluster, which its template names."""
    # Otherwise an image for the CPU would train beside an idle GPU.
    return link_variables(context) | ({"URM_DEVICE": "cuda"} if gpus else {})


def pod_arguments(task_id: str, resources: Resources, settings: Settings) -> dict[str, Any]:
    """What every pod of ours has, as arguments of KubernetesPodOperator; the client is imported only where used."""
    from kubernetes.client import models as k8s

    promoter: dict[str, Any] = {}
    if task_id in PROMOTERS:
        token = k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name="urm-promotion-token"))
        promoter = {
            "service_account_name": "urm-promoter",
            "automount_service_account_token": True,
            "env_from": [token],
        }
    limits = {"memory": resources.memory} | ({"nvidia.com/gpu": str(resources.gpus)} if resources.gpus else {})
    return {
        "name": f"urm-{task_id}",
        "namespace": settings.namespace,
        "image": settings.image,
        "cmds": ["urm"],
        "env_vars": partial(_pod_variables, resources.gpus),
        "pod_template_file": str(POD_TEMPLATE),
        "container_resources": k8s.V1ResourceRequirements(
            requests={"cpu": resources.cpu, "memory": resources.memory}, limits=limits
        ),
        "labels": {"app.kubernetes.io/component": "promote" if promoter else task_id},
        "active_deadline_seconds": round(resources.hours * 3600),  # a pod whose task is gone ends by itself
        "on_finish_action": "delete_succeeded_pod",
        "termination_message_policy": "FallbackToLogsOnError",
        "startup_timeout_seconds": 600,
        **promoter,
    }
