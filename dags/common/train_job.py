"""Runs `sft` on several nodes, as a TrainJob of Kubeflow Trainer."""

from functools import partial
from typing import Any

from airflow.sdk import Context
from kubeflow_trainer_api import models
from kubernetes.client import V1Pod

from components.exceptions import ConfigError
from components.settings import Settings
from dags.common.outcome import MlflowLink, StageMixin
from dags.common.params import link_variables, stage_arguments
from dags.common.pod_end import USER_ERROR_EXIT_CODE
from dags.common.pod_table import PodNeeds
from dags.trainjob.operator import TrainJobOperator

RUNTIME = "urm-sft"  # k8s/components/training/runtime.yaml
NODE = "node"  # its replicated job, and the container of its pods
PATCHES_OF = "urm.airflow/pod-table"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
PRIORITY_LABEL = "kueue.x-k8s.io/priority-class"
LOGGING_SECONDS = 60
# Longest start of a pod that has a node, and longest that torchrun waits for its peers; pulls an image with CUDA.
STARTUP_SECONDS = 1800
# How long torchrun lets its processes save a checkpoint after SIGTERM; the runtime's grace period is longer.
SHUTDOWN_SECONDS = 100


class StageTrainJobOperator(TrainJobOperator, StageMixin):
    """`urm <stage> …` as a TrainJob; success is a result.json, not the TrainJob's word."""

    operator_extra_links = (MlflowLink(),)
    inherits_from_skipmixin = True  # what the gate skipped stays skipped when it is cleared without the gate

    def __init__(self, *, stage: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stage = stage

    def execute(self, context: Context) -> None:
        """Run the TrainJob and read the stage's result."""
        super().execute(context)
        self.finish(context)

    def trigger_reentry(self, context: Context, event: dict[str, Any], progress: dict[str, Any]) -> None:
        """Go on after the wait for the TrainJob."""
        super().trigger_reentry(context, event, progress)
        self.finish(context)

    def describe(self, failed: V1Pod) -> str:
        """How a node failed, and what to do about too little memory."""
        text = super().describe(failed)
        return f"{text}; raise `memory` of {self.stage} in the table of pods" if "OOMKilled" in text else text


def train_job_arguments(stage: str, needs: PodNeeds, settings: Settings) -> dict[str, Any]:
    """What a stage's TrainJob needs, as arguments of StageTrainJobOperator.

    Raises:
        ConfigError: The row of the table asks for what a TrainJob cannot have.
    """
    if needs.priority_class and not needs.kueue_queue:
        raise ConfigError(
            f"table of pods, {stage}.priority_class",
            expected="none, since Trainer gives pods of several nodes no priority, or a `kueue_queue` beside it",
            got=repr(needs.priority_class),
            remedy="correct it",
        )
    return {
        "train_job": partial(render_train_job, stage, needs, settings),
        "namespace": settings.namespace,
        "queue_timeout": needs.queue_hours * 3600,
        "startup_timeout": STARTUP_SECONDS,
        "active_deadline_seconds": round(needs.hours * 3600),  # starts anew when a queue has suspended the TrainJob
        "logging_interval": LOGGING_SECONDS,
        "disruptions": needs.disruptions,
        "fail_on_exit_code": USER_ERROR_EXIT_CODE,
        "replicated_job": NODE,
        "base_container_name": NODE,
        "deferrable": True,
    }


def render_train_job(
    stage: str, needs: PodNeeds, settings: Settings, context: Context, jinja_env: Any = None
) -> dict[str, Any]:
    """The TrainJob of a stage, as the tab *Rendered Templates* shows it."""
    environment = link_variables(context) | ({"URM_DEVICE": "cuda"} if needs.gpus else {})
    waits = ["--rdzv-conf", f"timeout={STARTUP_SECONDS}", "--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    trainer = models.TrainerV1alpha1Trainer(
        image=needs.image,
        command=["python", "-m", "components.torchrun", *waits, "-m", "components"],
        args=stage_arguments(stage, context),
        env=[models.IoK8sApiCoreV1EnvVar(name=name, value=value) for name, value in environment.items()],
        num_nodes=needs.nodes,
        num_proc_per_node=max(needs.gpus, 1),
        resources_per_node=_resources(needs),
    )
    queue = {QUEUE_LABEL: needs.kueue_queue} if needs.kueue_queue else {}
    priority = {PRIORITY_LABEL: needs.priority_class} if needs.priority_class else {}
    labels = {
        "app.kubernetes.io/name": "urm",
        "app.kubernetes.io/component": stage,
        "app.kubernetes.io/managed-by": "airflow",
    }
    job = models.TrainerV1alpha1TrainJob(
        metadata=models.IoK8sApimachineryPkgApisMetaV1ObjectMeta(name=f"urm-{stage}", labels=labels | queue | priority),
        spec=models.TrainerV1alpha1TrainJobSpec(
            runtime_ref=models.TrainerV1alpha1RuntimeRef(
                api_group="trainer.kubeflow.org", kind="TrainingRuntime", name=RUNTIME
            ),
            suspend=bool(queue),  # Kueue admits it
            trainer=trainer,
            runtime_patches=[_patch(_pod_patch(needs))],
        ),
    )
    found: dict[str, Any] = job.to_dict()
    return found


def _resources(needs: PodNeeds) -> models.IoK8sApiCoreV1ResourceRequirements:
    quantity = models.IoK8sApimachineryPkgApiResourceQuantity
    bounded = {"memory": quantity(needs.memory), "ephemeral-storage": quantity(needs.ephemeral_storage)}
    gpus = {"nvidia.com/gpu": quantity(str(needs.gpus))} if needs.gpus else {}
    return models.IoK8sApiCoreV1ResourceRequirements(
        requests={"cpu": quantity(needs.cpu), **bounded, **gpus}, limits={**bounded, **gpus}
    )


def _pod_patch(needs: PodNeeds) -> models.TrainerV1alpha1PodSpecPatch:
    """Disks and place of a node."""
    disk = models.IoK8sApiCoreV1EmptyDirVolumeSource(
        size_limit=models.IoK8sApimachineryPkgApiResourceQuantity(needs.ephemeral_storage)
    )
    cache: dict[str, Any] = {"empty_dir": disk}
    if needs.cache_claim:
        claim = models.IoK8sApiCoreV1PersistentVolumeClaimVolumeSource(claim_name=needs.cache_claim)
        cache = {"persistent_volume_claim": claim}
    kinds = {"cache": cache, "tmp": {"empty_dir": disk}}
    paths = {"cache": "/cache", "tmp": "/tmp"}  # noqa: S108
    if needs.shared_memory:
        size = models.IoK8sApimachineryPkgApiResourceQuantity(needs.shared_memory)
        memory = models.IoK8sApiCoreV1EmptyDirVolumeSource(medium="Memory", size_limit=size)
        kinds["shared-memory"] = {"empty_dir": memory}
        paths["shared-memory"] = "/dev/shm"  # noqa: S108
    volumes = [models.IoK8sApiCoreV1Volume(name=name, **kind) for name, kind in kinds.items()]
    mounts = [models.IoK8sApiCoreV1VolumeMount(name=name, mount_path=path) for name, path in paths.items()]
    return models.TrainerV1alpha1PodSpecPatch(
        volumes=volumes,
        containers=[models.TrainerV1alpha1ContainerPatch(name=NODE, volume_mounts=mounts)],
        node_selector=needs.node_selector or None,
        tolerations=[models.IoK8sApiCoreV1Toleration(**one.model_dump()) for one in needs.tolerations] or None,
    )


def _patch(pod: models.TrainerV1alpha1PodSpecPatch) -> models.TrainerV1alpha1RuntimePatch:
    """The patch of a pod, in the place where the runtime has it."""
    node = models.TrainerV1alpha1ReplicatedJobPatch(
        name=NODE,
        template=models.TrainerV1alpha1JobTemplatePatch(
            spec=models.TrainerV1alpha1JobSpecPatch(template=models.TrainerV1alpha1PodTemplatePatch(spec=pod))
        ),
    )
    template = models.TrainerV1alpha1JobSetTemplatePatch(
        spec=models.TrainerV1alpha1JobSetSpecPatch(replicated_jobs=[node])
    )
    return models.TrainerV1alpha1RuntimePatch(
        manager=PATCHES_OF, training_runtime_spec=models.TrainerV1alpha1TrainingRuntimeSpecPatch(template=template)
    )
