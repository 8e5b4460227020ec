"""How far the rollout of a Deployment is, and why it goes no further, from what the cluster says of its pods."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from components.deploy.cluster import Object

_USER_ERROR = 2  # exit code of `urm`: no restart helps
_RESTARTS = 2  # after so many a container that crashes is given up
_WORDS = 400  # characters of a message that a sentence quotes
_PULL = {"ErrImagePull", "ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "RegistryUnavailable"}
_STARTING = {"", "ContainerCreating", "PodInitializing", "CrashLoopBackOff"}  # the last is told by how it ended


@dataclass(frozen=True)
class Trouble:
    """Why a rollout is not complete.

    Attributes:
        reason: In words.
        final: Whether waiting cannot help.
    """

    reason: str
    final: bool = False


def is_complete(deployment: Object) -> bool:
    """Whether all pods are of the newest template and available; the rule of `kubectl rollout status`."""
    status: Object = deployment.get("status", {})
    wanted, updated = replicas(deployment), status.get("updatedReplicas", 0)
    return bool(
        is_seen(deployment)
        and updated >= wanted
        and status.get("replicas", 0) <= updated
        and status.get("availableReplicas", 0) >= updated
    )


def is_seen(deployment: Object) -> bool:
    """Whether the status is of the Deployment as it is, and not of the one before."""
    observed: int = deployment.get("status", {}).get("observedGeneration", 0)
    return observed >= int(deployment["metadata"]["generation"])


def replicas(deployment: Object) -> int:
    """Pods that the Deployment asks for."""
    return int(deployment["spec"].get("replicas", 1))


def find_trouble(deployment: Object, pods: Sequence[Object], warnings: Callable[[str], list[str]]) -> Trouble:
    """Why a rollout that is not complete is not, as far as the cluster says.

    Args:
        deployment: As it is now.
        pods: Its pods of the newest template.
        warnings: The cluster's warnings about an object of a name, oldest first.
    """
    name = deployment["metadata"]["name"]
    found = [trouble for pod in pods if (trouble := explain_pod(pod, warnings)) is not None]
    found.sort(key=lambda trouble: not trouble.final)
    conditions = {condition["type"]: condition for condition in deployment.get("status", {}).get("conditions", [])}
    if not is_seen(deployment):
        conditions = {}  # of the template before
    refused = conditions.get("ReplicaFailure", {})
    late = conditions.get("Progressing", {}).get("reason") == "ProgressDeadlineExceeded"
    if not found and refused.get("status") == "True":
        found = [Trouble(f"{name}: no pod can be made ({_quote(refused.get('message', ''))})")]
    if not found:
        found = [Trouble(f"{name}: {len(pods)} of {replicas(deployment)} new pods, the old ones are not gone yet")]
    return Trouble(found[0].reason, found[0].final or late)


def explain_pod(pod: Object, warnings: Callable[[str], list[str]]) -> Trouble | None:
    """Why a pod is not ready, or None if it is."""
    name, status = pod["metadata"]["name"], pod.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    if conditions.get("Ready", {}).get("status") == "True":
        return None
    scheduled = conditions.get("PodScheduled", {})
    if scheduled.get("status") == "False":
        return Trouble(f"pod {name}: cannot be scheduled ({_quote(scheduled.get('message', ''))})")
    for container in _containers(status):
        trouble = _explain_container(f"pod {name}, container {container['name']}", pod, container)
        if trouble is not None:
            return trouble
    warned = [f" ({_quote(text)})" for text in warnings(name)[-1:] if text]
    if status.get("phase") == "Running":
        return Trouble(f"pod {name}: runs but is not ready{''.join(warned)}")
    return Trouble(f"pod {name}: is still {status.get('phase', 'Pending').lower()}{''.join(warned)}")


def _containers(status: Object) -> Iterator[Object]:
    yield from status.get("initContainerStatuses", [])
    yield from status.get("containerStatuses", [])


def _explain_container(subject: str, pod: Object, container: Object) -> Trouble | None:
    """Why a container does not run; None if it does, has ended well, or has just begun."""
    waiting: Object = container.get("state", {}).get("waiting", {})
    reason: str = waiting.get("reason", "")
    if reason in _PULL:
        words = f"image {container['image']} cannot be pulled ({_quote(waiting.get('message', reason))})"
        return Trouble(f"{subject}: {words}", final=reason in ("ErrImageNeverPull", "InvalidImageName"))
    if reason not in _STARTING:
        return Trouble(f"{subject}: {reason} ({_quote(waiting.get('message', ''))})")
    ended = container.get("state", {}).get("terminated") or container.get("lastState", {}).get("terminated")
    if not ended or ended["exitCode"] == 0:
        return None
    restarts = container.get("restartCount", 0)
    if ended.get("reason") == "OOMKilled":
        words = f"was killed for memory (OOMKilled, limit {_memory_limit(pod, container['name'])})"
    else:
        words = f"ended with exit code {ended['exitCode']}"
        words += f": {_quote(ended['message'])}" if ended.get("message") else ""
    return Trouble(f"{subject}: {words}", final=ended["exitCode"] == _USER_ERROR or restarts >= _RESTARTS)


def _memory_limit(pod: Object, name: str) -> Any:
    containers = [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]
    limits = [one.get("resources", {}).get("limits", {}).get("memory") for one in containers if one["name"] == name]
    return limits[0] if limits and limits[0] else "none"


def _quote(message: str) -> str:
    """The last line of a message that has words: an error's sentence comes last."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1].removeprefix("error ").rstrip(".")[:_WORDS] if lines else "no message"
