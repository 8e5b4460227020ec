"""What the API server says of a TrainJob and its pods, as answers to the questions of operator and trigger.

A TrainJob owns a JobSet of its name, whose Jobs own the pods. Trainer's conditions say only whether it is suspended,
complete or failed, so whether it runs is read from the pods.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Self

from kubeflow_trainer_api.models.trainer_v1alpha1_train_job import TrainerV1alpha1TrainJob as TrainJob
from kubernetes.client import ApiException, V1Pod
from urllib3.exceptions import HTTPError

from dags.trainjob.logs import Position

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
JOBSET_LABEL = "jobset.sigs.k8s.io/jobset-name"
REPLICATED_JOB_LABEL = "jobset.sigs.k8s.io/replicatedjob-name"
# Reasons of a pod that its node has ended or refused. A pod that is evicted for its own use of a disk has none of them.
DISRUPTIONS = ("Preempting", "Shutdown", "NodeShutdown", "Terminated", "NodeLost", "NodeAffinity")
SIGTERM_EXIT_CODE = 143
INDEX_LABEL = "batch.kubernetes.io/job-completion-index"


@dataclass
class Progress:
    """What is known of a submitted TrainJob; travels with the trigger, and in the task's state store.

    Attributes:
        name, namespace, uid: The TrainJob. Another one of the same name has another uid.
        waiting_since: When it began to wait for admission or nodes, in seconds since 1970; none while it runs.
        suspended: Whether it was suspended when last looked at.
        disrupted: Whether a pod was evicted, preempted or lost with its node since all pods last ran.
        disruptions: TrainJobs of this attempt that ended by that, or were deleted by others.
        log: How far the log of the first node has been read.
    """

    name: str
    namespace: str
    uid: str
    waiting_since: float | None
    suspended: bool = False
    disrupted: bool = False
    disruptions: int = 0
    log: Position = field(default_factory=Position)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(**{**content, "log": Position(**content["log"])})

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and numbers."""
        return asdict(self)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may be answered later."""
    busy = isinstance(error, ApiException) and (error.status in (0, 429) or error.status >= 500)
    return busy or isinstance(error, HTTPError)


def find_condition(job: TrainJob, *types: str) -> Any | None:
    """The first condition of these types that is true."""
    conditions = (job.status.conditions if job.status else None) or []
    return next((one for one in conditions if one.type in types and one.status == "True"), None)


def is_suspended(job: TrainJob) -> bool:
    """Whether it was submitted to a queue and is not admitted, or was preempted."""
    return bool(job.spec and job.spec.suspend)


def count_nodes(job: TrainJob) -> int:
    """Pods that it needs to run; what only its runtime says is unknown here, and counts as one."""
    trainer = job.spec.trainer if job.spec else None
    return (trainer.num_nodes if trainer else None) or 1


def select_nodes(job: TrainJob, pods: Iterable[V1Pod], replicated_job: str) -> list[V1Pod]:
    """Its pods of a replicated job, by rank; of those with one rank the newest, which replaces the others, is last."""
    created = job.metadata.creation_timestamp
    own = [
        pod
        for pod in pods
        if (pod.metadata.labels or {}).get(REPLICATED_JOB_LABEL) == replicated_job
        and not (created and pod.metadata.creation_timestamp < created)
    ]
    return sorted(own, key=lambda pod: (rank(pod), pod.metadata.creation_timestamp))


def rank(pod: V1Pod) -> int:
    """Rank of a node: its completion index."""
    return int((pod.metadata.labels or {}).get(INDEX_LABEL, 0))


def newest(nodes: Iterable[V1Pod]) -> list[V1Pod]:
    """The last pod of each rank, of what `select_nodes` returns."""
    return list({rank(pod): pod for pod in nodes}.values())


def is_running(job: TrainJob, nodes: Iterable[V1Pod]) -> bool:
    """Whether all its nodes run, or have ended well."""
    good = [
        pod
        for pod in newest(nodes)
        if not pod.metadata.deletion_timestamp and pod.status.phase in ("Running", "Succeeded")
    ]
    return not is_suspended(job) and len(good) >= count_nodes(job)


def find_disrupted(nodes: Iterable[V1Pod], container: str) -> list[V1Pod]:
    """Nodes that Kubernetes ends, or has ended, for a reason that is not their own, and that nothing has replaced."""
    return [pod for pod in newest(nodes) if _is_disrupted(pod, container)]


def _is_disrupted(pod: V1Pod, container: str) -> bool:
    conditions = pod.status.conditions or []
    marked = any(one.type == "DisruptionTarget" and one.status == "True" for one in conditions)
    return marked or pod.status.reason in DISRUPTIONS or exit_code(pod, container) == SIGTERM_EXIT_CODE


def container_state(pod: V1Pod, container: str) -> Any | None:
    """State of a container; none before the kubelet knows of it."""
    return next((one.state for one in pod.status.container_statuses or [] if one.name == container), None)


def exit_code(pod: V1Pod, container: str) -> int | None:
    """Exit code of a container that has ended."""
    state = container_state(pod, container)
    return state.terminated.exit_code if state and state.terminated else None


def find_failed(nodes: Iterable[V1Pod], container: str) -> V1Pod | None:
    """The pod that failed first: its peers mostly fail because it is gone."""
    failed = [pod for pod in newest(nodes) if exit_code(pod, container) or pod.status.phase == "Failed"]
    return min(failed, key=lambda pod: _ended_at(pod, container), default=None)


def _ended_at(pod: V1Pod, container: str) -> datetime:
    state = container_state(pod, container)
    ended: datetime | None = state.terminated.finished_at if state and state.terminated else None
    return ended or datetime.max.replace(tzinfo=UTC)


def describe_failure(pod: V1Pod, container: str) -> str:
    """Which pod failed and how, in one clause."""
    state = container_state(pod, container)
    where = f"pod {pod.metadata.name} (rank {rank(pod)}) on {pod.spec.node_name or 'no node'}"
    if state is None or state.terminated is None:
        return f"{where} failed: {pod.status.reason or 'no reason given'} {pod.status.message or ''}".rstrip()
    ended = state.terminated
    reason = f" ({ended.reason})" if ended.reason and ended.reason not in ("Error", "Completed") else ""
    return f"{where} ended with exit code {ended.exit_code}{reason}"


def describe_waiting(job: TrainJob, nodes: Sequence[V1Pod]) -> str:
    """What it waits for, in one clause."""
    if is_suspended(job):
        return "it is suspended and waits for admission"
    reasons = [reason for pod in newest(nodes) if (reason := _why_pending(pod))]
    running = sum(pod.status.phase == "Running" and not pod.metadata.deletion_timestamp for pod in newest(nodes))
    text = f"{running} of {count_nodes(job)} pods run"
    return f"{text}; {reasons[0]}" if reasons else text


def _why_pending(pod: V1Pod) -> str:
    if pod.status.phase != "Pending":
        return ""
    for condition in pod.status.conditions or []:
        if condition.type == "PodScheduled" and condition.status == "False":
            return f"{pod.metadata.name}: {condition.message or condition.reason}"
    for status in (pod.status.init_container_statuses or []) + (pod.status.container_statuses or []):
        if status.state and status.state.waiting:
            waiting = status.state.waiting
            return f"{pod.metadata.name}: {waiting.reason} {waiting.message or ''}".rstrip()
    return ""


def find_stuck(nodes: Iterable[V1Pod], startup_timeout: float, now: datetime) -> V1Pod | None:
    """A pod that has had a node for longer than `startup_timeout` seconds and has not started, e.g. for its image."""
    for pod in newest(nodes):
        scheduled = [one for one in pod.status.conditions or [] if one.type == "PodScheduled" and one.status == "True"]
        waits = pod.status.phase == "Pending" and not pod.metadata.deletion_timestamp
        if waits and scheduled and now - scheduled[0].last_transition_time > timedelta(seconds=startup_timeout):
            return pod
    return None
