"""How a pod ended, or why it does not start: judged from what Kubernetes says about it, without asking it anything.

The words of Kubernetes are those of pods' status: https://kubernetes.io/docs/concepts/workloads/pods/pod-lifecycle/.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

CONTAINER = "base"
USER_ERROR_EXIT_CODE = 2
SIGTERM_EXIT_CODE = 143
ENDED = ("Succeeded", "Failed")
# Reasons of a pod that its node has ended or refused.
NODE_REASONS = {"NodeAffinity", "NodeLost", "NodeShutdown", "Preempting", "Shutdown", "Terminated"}
# Reasons of a container whose end nobody saw, since its node restarted or was away.
UNSEEN_REASONS = {"ContainerStatusUnknown", "Unknown"}
NEVER_STARTS = {"StartError", "ContainerCannotRun"}
# Reasons of a container that waits for something which is not there: for good, or until somebody brings it.
FINAL_REASONS = {"InvalidImageName", "ErrImageNeverPull"}
MISSING_REASONS = {"ErrImagePull", "ImagePullBackOff", "CreateContainerConfigError", "CreateContainerError"}
MISSING_SECONDS = 120  # after that, what is missing stays so: an image or a secret may be a little late
STARTUP_SECONDS = 1800  # from the node to the first line of the program; pulls an image with CUDA
UNFINISHED_SECONDS = 30  # between the end of the program and that of the pod
LOST_SECONDS = 60  # after the end that a deleted pod was given: its node does not answer


@dataclass(frozen=True)
class Ending:
    """What became of a pod.

    Attributes:
        outcome: `exited`: the program ended by itself, with `exit_code`. `disrupted`: the cluster or a person ended the
            pod, and another one may do better. `failed`: worth another try. `hopeless`: not worth one.
        reason: A sentence; of a program that exited, its last line.
    """

    outcome: Literal["exited", "disrupted", "failed", "hopeless"]
    reason: str
    exit_code: int | None = None


def judge_end(pod: Any, now: datetime) -> Ending | None:
    """How the pod ended; None while it has not, or while Kubernetes may still say more about it."""
    status = pod.status
    ended: Any = _state(pod).terminated if _state(pod) else None
    deletion = pod.metadata.deletion_timestamp
    finished = status.phase in ENDED
    if ended and ended.finished_at and now - ended.finished_at > timedelta(seconds=UNFINISHED_SECONDS):
        finished = True
    if not finished:
        lost = deletion and now - deletion > timedelta(seconds=LOST_SECONDS)
        return (
            Ending("disrupted", f"{_name(pod)} was deleted, and its node does not say that it ended") if lost else None
        )
    exit_code = ended.exit_code if ended else None
    if exit_code in (0, USER_ERROR_EXIT_CODE):
        return Ending("exited", _last_line(ended.message), exit_code)
    if ended and ended.reason in NEVER_STARTS:
        return Ending(
            "hopeless", _sentence(pod, "a program that starts", ended.message, "correct `image` in the table of pods")
        )
    if status.reason == "DeadlineExceeded":
        hours = f"at most {(pod.spec.active_deadline_seconds or 0) / 3600:g} h of run time"
        return Ending("failed", _sentence(pod, hours, "more", "raise `hours` in the table of pods"))
    if cause := disruption(pod):
        return Ending("disrupted", f"{_name(pod)} was ended from outside: {cause}")
    if status.reason == "Evicted":
        limit = f"at most {_limit(pod, 'ephemeral-storage')} of disk"
        remedy = "raise `ephemeral_storage` in the table of pods"
        return Ending("failed", _sentence(pod, limit, status.message, remedy))
    if ended and ended.reason == "OOMKilled":
        remedy = "raise `memory` in the table of pods"
        return Ending("failed", _sentence(pod, f"at most {_limit(pod, 'memory')} of memory", "OOMKilled", remedy))
    if ended is None:
        return Ending("disrupted", f"{_name(pod)} was refused by its node: {status.reason}: {status.message}")
    return Ending("exited", _last_line(ended.message) or ended.reason or "", exit_code)


def judge_wait(pod: Any, now: datetime, queue_seconds: float, missing_since: datetime | None) -> Ending | None:
    """Why a pod that has not started should be given up; None while it may wait on.

    `missing_since` is when its container was first seen to wait for something missing.
    """
    waited = now - pod.metadata.creation_timestamp
    scheduled = _condition(pod, "PodScheduled")
    if scheduled is None or scheduled.status != "True":
        if waited <= timedelta(seconds=queue_seconds):
            return None
        limit, why = f"a node within {queue_seconds / 3600:g} h", scheduled.message if scheduled else "no answer"
        return Ending("hopeless", _sentence(pod, limit, why, "free one, or change `queue_hours` in the table of pods"))
    reason, message = waiting_for(pod)
    late = missing_since is not None and now - missing_since > timedelta(seconds=MISSING_SECONDS)
    if reason in FINAL_REASONS or (reason in MISSING_REASONS and late):
        return Ending("hopeless", say_missing(pod, reason, message))
    if now - scheduled.last_transition_time > timedelta(seconds=STARTUP_SECONDS):
        start = f"a start within {STARTUP_SECONDS // 60} min of its place on a node"
        return Ending("failed", _sentence(pod, start, f"{reason}: {message}", "look at its events and volumes"))
    return None


def say_missing(pod: Any, reason: str, message: str) -> str:
    """What a pod that cannot start lacks, and what to do."""
    remedy = "correct the image, secret or settings that it names, and clear the task"
    return _sentence(pod, "all it needs to start", f"{reason}: {message}", remedy)


def describe(pod: Any) -> str:
    """Where the pod stands, in a line: what it waits for, or the node that it runs on."""
    scheduled = _condition(pod, "PodScheduled")
    if scheduled is None or scheduled.status != "True":
        return f"waits for a node: {scheduled.message if scheduled and scheduled.message else 'queued'}"
    if has_started(pod):
        ended = pod.status.phase in ENDED
        return f"{'has ended' if ended else 'runs'} on node {pod.spec.node_name}"
    reason, message = waiting_for(pod)
    return f"starts on node {pod.spec.node_name}: {reason}" + (f": {message}" if message else "")


def disruption(pod: Any) -> str | None:
    """What ends the pod from outside; None if nothing does."""
    status, target = pod.status, _condition(pod, "DisruptionTarget")
    ended: Any = _state(pod).terminated if _state(pod) else None
    if target is not None and target.status == "True":
        return f"{target.reason}: {target.message}"
    if pod.metadata.deletion_timestamp:
        return "somebody deleted it"
    if status.reason in NODE_REASONS:
        return f"{status.reason}: {status.message}"
    if ended and ended.reason in UNSEEN_REASONS:
        return f"its node lost it ({ended.reason})"
    if ended and ended.exit_code == SIGTERM_EXIT_CODE:
        return "it was asked to stop"
    return None


def waiting_for(pod: Any, container: str = CONTAINER) -> tuple[str, str]:
    """Reason and message of a container that has not started."""
    state = _state(pod, container)
    waiting = state.waiting if state else None
    return (waiting.reason or "", waiting.message or "") if waiting else ("ContainerCreating", "")


def has_started(pod: Any) -> bool:
    """Whether the program has ever run."""
    state = _state(pod)
    return bool(state and (state.running or state.terminated))


def _state(pod: Any, container: str = CONTAINER) -> Any:
    for status in pod.status.container_statuses or []:
        if status.name == container:
            return status.state
    return None


def _condition(pod: Any, kind: str) -> Any:
    return next((one for one in pod.status.conditions or [] if one.type == kind), None)


def _limit(pod: Any, resource: str) -> str:
    container = next(one for one in pod.spec.containers if one.name == CONTAINER)
    limits = (container.resources.limits if container.resources else None) or {}
    return str(limits.get(resource, "its limit"))


def _last_line(text: str | None) -> str:
    return ((text or "").strip().splitlines() or [""])[-1]


def _name(pod: Any) -> str:
    return f"pod {pod.metadata.name}"


def _sentence(pod: Any, expected: str, got: str | None, remedy: str) -> str:
    found = " ".join((got or "nothing").split()).rstrip(".")
    return f"{_name(pod)}: expected {expected}, got {found}; {remedy}."
