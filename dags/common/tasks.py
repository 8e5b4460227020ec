"""Turns rows of the flow, or `urm` commands, into Airflow tasks: local processes, or pods of a Kubernetes cluster.

`URM_EXECUTOR` chooses (`local` or `kubernetes`); the graph of a DAG is the same in both.
"""

from collections.abc import Callable, Collection
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from airflow.sdk import BaseOperator, Context, Param, XComArg

from components.flow import FLOWS, STAGES, Access, Resources, direct_inputs
from components.settings import Settings, get_settings
from dags.common.params import SERVING_RELEASE, announce_release, engine_variables, link_variables
from dags.common.pod_table import PodNeeds, read_pod_needs

POOL = "compute"  # one slot on one machine: heavy stages never share its cores
OWNER = "recommendation"
PROMOTERS = ("promote", "rollback")  # they change which release serves
BACKFILL = Resources(hours=168, cpu="1", memory="1792Mi", pool=False)  # days, where there are millions of users
# What `k8s/components/spark/` says of Spark: how many executors of which size, and the template of their pods.
SPARK_CONFIGURATION, SPARK_CONF_DIR, SPARK_ACCOUNT = "urm-spark", "/etc/spark", "urm-spark"
POD_TEMPLATE = Path(__file__).parents[2] / "k8s" / "jobs" / "stage-pod.yaml"

# Transient faults (a service away, a process or pod killed) are tried again; a mistake in the input is not.
RETRY_POLICY: dict[str, Any] = {
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "retry_exponential_backoff": True,
    "max_retry_delay": timedelta(minutes=5),
}


def stage_task(stage: str, settings: Settings | None = None) -> BaseOperator:
    """The task of a stage; its id is the stage's name. Settings are by default read from the environment.

    Raises:
        ConfigError: The table of pods has a mistake.
    """
    settings, spec = settings or get_settings(), STAGES[stage]
    common = _common(stage, f"{spec.summary} {spec.notes}".strip(), spec.resources)
    if settings.executor == "kubernetes":
        needs = read_pod_needs(stage, spec.resources, settings)
        if needs.nodes > 1:
            from dags.common.train_job import StageTrainJobOperator, train_job_arguments

            return StageTrainJobOperator(stage=stage, **_of_pod(common), **train_job_arguments(stage, needs, settings))
        from dags.common.pod import StagePodOperator

        return StagePodOperator(stage=stage, **_of_pod(common), **pod_arguments(stage, needs, spec.access, settings))
    from dags.common.process import StageProcessOperator

    return StageProcessOperator(stage=stage, **common)


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
    task_id: str,
    commands: XComArg,
    *,
    doc: str,
    resources: Resources,
    access: Access,
    settings: Settings | None = None,
) -> XComArg:
    """One task per command, each in a slot of the pool `compute`; returns what `chain` takes.

    The commands, argument lists of `urm`, are known when the DAG runs. `doc` is shown on the task's page; resources are
    those of one command, `access` the class of its pod. Settings are by default read from the environment.
    """
    settings = settings or get_settings()
    common = _common(task_id, doc, resources)
    if settings.executor == "kubernetes":
        from dags.common.pod import UrmPodOperator

        pod = pod_arguments(task_id, read_pod_needs(task_id, resources, settings), access, settings)
        return UrmPodOperator.partial(**_of_pod(common), **pod).expand(arguments=commands).output
    from dags.common.process import UrmProcessOperator

    return UrmProcessOperator.partial(**common, credentials=["feast", "mlflow"]).expand(arguments=commands).output


def command_task(
    task_id: str,
    arguments: Callable[..., list[str]],
    *,
    doc: str,
    resources: Resources,
    access: Access,
    credentials: Collection[str],
    settings: Settings | None = None,
) -> BaseOperator:
    """The task of one `urm` command that no retry repeats, since a command may go from where it stands.

    `arguments` gives them from the context of a DAG run; `credentials` are the services whose it needs as a process,
    `access` the class of its pod.
    """
    settings = settings or get_settings()
    common = _common(task_id, doc, resources) | {"retries": 0}
    if settings.executor == "kubernetes":
        from dags.common.pod import UrmPodOperator

        pod = pod_arguments(task_id, read_pod_needs(task_id, resources, settings), access, settings)
        pod["disruptions"] = 0  # another pod would be a second command
        return UrmPodOperator(**_of_pod(common), **pod, arguments=arguments)
    from dags.common.process import UrmProcessOperator

    return UrmProcessOperator(**common, credentials=credentials, arguments=arguments)


def backfill_task(settings: Settings | None = None) -> BaseOperator:
    """The back-fill: a process, or an Indexed Job. Settings are by default read from the environment."""
    settings = settings or get_settings()
    doc = "Computes every user known from training who has no result of the serving release. A try goes on where the "
    common = _common("backfill", doc + "one before was.", BACKFILL)
    if settings.executor == "kubernetes":
        from dags.common.backfill_job import BackfillJobOperator

        needs = read_pod_needs("backfill", BACKFILL, settings)
        return BackfillJobOperator(needs=needs, settings=settings, **_of_pod(common))
    from dags.common.backfill import BackfillProcessOperator, backfill_arguments

    return BackfillProcessOperator(arguments=backfill_arguments, credentials=["feast", "redis"], **common)


def _common(task_id: str, doc: str, resources: Resources) -> dict[str, Any]:
    """Arguments that every operator of ours has."""
    pool = {"pool": POOL} if resources.pool else {}
    timeout = timedelta(hours=resources.hours)
    announced = {"outlets": [SERVING_RELEASE], "post_execute": announce_release} if task_id in PROMOTERS else {}
    common = {"task_id": task_id, "owner": OWNER, "doc_md": doc, "execution_timeout": timeout}
    return common | pool | announced | RETRY_POLICY


def _of_pod(common: dict[str, Any]) -> dict[str, Any]:
    """The same for a pod, whose limits of queue and run are its own: Airflow's limit would count both together."""
    return {name: value for name, value in common.items() if name != "execution_timeout"}


def _pod_variables(gpus: int, stage: str, context: Context, jinja_env: Any = None) -> dict[str, str]:
    """Variables that a pod gets beside those of the cluster, which its template names."""
    # Otherwise an image for the CPU would train beside an idle GPU.
    cuda = {"URM_DEVICE": "cuda"} if gpus else {}
    engine = engine_variables(stage)
    conf = {"SPARK_CONF_DIR": SPARK_CONF_DIR} if engine.get("URM_ENGINE") == "spark" else {}
    return link_variables(context) | cuda | engine | conf


def pod_arguments(task_id: str, needs: PodNeeds, access: Access, settings: Settings) -> dict[str, Any]:
    """What every pod of ours has, as arguments of UrmPodOperator; the client is imported only where used."""
    from kubernetes.client import models as k8s

    disk = {"ephemeral-storage": needs.ephemeral_storage}
    own_disk = k8s.V1EmptyDirVolumeSource(size_limit=needs.ephemeral_storage)
    cache: dict[str, Any] = {"empty_dir": own_disk}
    if needs.cache_claim:
        claim = k8s.V1PersistentVolumeClaimVolumeSource(claim_name=needs.cache_claim)
        cache = {"persistent_volume_claim": claim}
    volumes = [k8s.V1Volume(name="cache", **cache), k8s.V1Volume(name="tmp", empty_dir=own_disk)]
    mounts = []
    if needs.shared_memory:
        memory = k8s.V1EmptyDirVolumeSource(medium="Memory", size_limit=needs.shared_memory)
        volumes.append(k8s.V1Volume(name="shared-memory", empty_dir=memory))
        mounts.append(k8s.V1VolumeMount(name="shared-memory", mount_path="/dev/shm"))  # noqa: S108
    stage = task_id if task_id in STAGES else ""
    on_spark = bool(stage) and STAGES[stage].spark and settings.engine == "spark"
    if on_spark:
        source = k8s.V1ConfigMapVolumeSource(name=SPARK_CONFIGURATION, optional=True)
        volumes.append(k8s.V1Volume(name="spark", config_map=source))
        mounts.append(k8s.V1VolumeMount(name="spark", mount_path=SPARK_CONF_DIR, read_only=True))
    starts_pods = on_spark and settings.spark_master.startswith("k8s://")  # its executors
    own = {"URM_SPARK_DRIVER_HOST": "status.podIP", "URM_SPARK_DRIVER_POD": "metadata.name"} if starts_pods else {}
    gpus = {"nvidia.com/gpu": str(needs.gpus)} if needs.gpus else {}
    queue = {"kueue.x-k8s.io/queue-name": needs.kueue_queue} if needs.kueue_queue else {}
    promotes = access == "promotion"
    return {
        "name": f"urm-{task_id.replace('_', '-')}",
        "namespace": settings.namespace,
        "image": needs.image,
        "cmds": ["urm"],
        "env_vars": partial(_pod_variables, needs.gpus, stage),
        "pod_runtime_info_envs": [
            k8s.V1EnvVar(name=name, value_from=k8s.V1EnvVarSource(field_ref=k8s.V1ObjectFieldSelector(field_path=path)))
            for name, path in own.items()
        ],
        "env_from": [k8s.V1EnvFromSource(secret_ref=k8s.V1SecretEnvSource(name=f"urm-{access}"))],
        "pod_template_file": str(POD_TEMPLATE),
        "container_resources": k8s.V1ResourceRequirements(
            requests={"cpu": needs.cpu, "memory": needs.memory, **disk}, limits={"memory": needs.memory, **disk, **gpus}
        ),
        "volumes": volumes,
        "volume_mounts": mounts,
        "node_selector": needs.node_selector,
        "tolerations": [k8s.V1Toleration(**one.model_dump()) for one in needs.tolerations],
        "priority_class_name": needs.priority_class,
        "service_account_name": SPARK_ACCOUNT if starts_pods else f"urm-{access}",
        "automount_service_account_token": promotes or starts_pods,
        # The network policies know the pods of promotions, which reach the cluster's API, by this label.
        "labels": {"app.kubernetes.io/component": "promote" if promotes else task_id, **queue},
        "active_deadline_seconds": round(
            needs.hours * 3600
        ),  # from the node's start on; a pod without a task ends, too
        "termination_message_policy": "FallbackToLogsOnError",
        "queue_hours": needs.queue_hours,
        "disruptions": needs.disruptions,
    }
