"""A stand-in for a cluster with Kubeflow Trainer where there is none: an HTTP server of TrainJobs, pods and their logs.

It keeps what a TrainJob's operator relies on: uids and preconditions of deletions, labels as selectors, and logs by
`sinceSeconds` and `tailLines`, with timestamps. What Trainer, JobSet, Kueue and the kubelet do, a test says.
"""

import re
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.worlds.http_server import connect_airflow, serve

__all__ = ["trainer"]  # fixtures

Object = dict[str, Any]
NAMESPACE = "training"
_JOBS = re.compile(rf"/apis/trainer.kubeflow.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs(/(?P<name>[\w-]+))?$")
_CORE = re.compile(rf"/api/v1/namespaces/{NAMESPACE}/(?P<kind>pods|events)(/(?P<name>[\w-]+)/log)?$")


class Trainer:
    """TrainJobs and pods of one namespace.

    Attributes:
        jobs: TrainJobs by name.
        pods: Pods by name.
        deleted: Names of the TrainJobs that were deleted through the API.
        refused: Statuses with which the next requests are answered.
        warnings: Messages of the events of every TrainJob.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.deleted: list[str] = []
        self.refused: list[int] = []
        self.warnings: list[str] = []
        self._logs: dict[str, list[tuple[str, str]]] = {}
        self._clock = datetime.now(UTC)
        self._lock = threading.RLock()

    def only_job(self) -> Object:
        """The one TrainJob that there is."""
        (job,) = self.jobs.values()
        return job

    def suspend(self, suspended: bool = True) -> None:
        """What Kueue does: preempt or admit the TrainJob; a preempted one loses its pods."""
        with self._lock:
            job = self.only_job()
            job["spec"]["suspend"] = suspended
            if suspended:
                self.pods.clear()

    def start(self, phase: str = "Running") -> list[str]:
        """What JobSet and the kubelet do: the pods of the TrainJob; returns their names, by rank."""
        with self._lock:
            job = self.only_job()
            name, names = job["metadata"]["name"], []
            for index in range(job["spec"]["trainer"]["numNodes"]):
                pod = f"{name}-node-0-{index}-{uuid.uuid4().hex[:5]}"
                labels = {
                    "jobset.sigs.k8s.io/jobset-name": name,
                    "jobset.sigs.k8s.io/replicatedjob-name": "node",
                    "batch.kubernetes.io/job-completion-index": str(index),
                }
                scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": _text(self._tick())}
                state = (
                    {"running": {}} if phase == "Running" else {"waiting": {"reason": "ErrImagePull", "message": "no"}}
                )
                self.pods[pod] = {
                    "metadata": {**self._metadata(pod), "labels": labels},
                    "spec": {"nodeName": f"machine-{index}", "containers": [{"name": "node"}]},
                    "status": {"phase": phase, "conditions": [scheduled], "containerStatuses": [_status(state)]},
                }
                self._logs[pod] = []
                names.append(pod)
            return names

    def write(self, pod: str, *lines: str, at: datetime | None = None) -> None:
        """Lines of a pod's log, each a microsecond after the last, or all at one instant."""
        with self._lock:
            self._logs[pod] += [(_text(at or self._tick()), line) for line in lines]

    def rotate(self, pod: str) -> None:
        """What the kubelet does with a long log: it serves the new file only."""
        self._logs[pod].clear()

    def end_pod(self, pod: str, code: int, reason: str = "Error") -> None:
        """The container has ended."""
        with self._lock:
            ended = {"exitCode": code, "reason": reason, "finishedAt": _text(self._tick())}
            status = self.pods[pod]["status"]
            status |= {"phase": "Failed" if code else "Succeeded"}
            status["containerStatuses"] = [_status({"terminated": ended})]

    def disrupt(self, pod: str) -> None:
        """What an eviction does first."""
        with self._lock:
            self.pods[pod]["metadata"]["deletionTimestamp"] = _text(self._tick())
            reason = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
            self.pods[pod]["status"]["conditions"].append(reason)

    def end(self, kind: str, reason: str = "FailedJobs", message: str = "jobset failed") -> None:
        """Trainer's verdict: Complete or Failed."""
        with self._lock:
            condition = {"type": kind, "status": "True", "reason": reason, "message": message}
            condition["lastTransitionTime"] = _text(self._tick())
            self.only_job()["status"] = {"conditions": [condition]}

    def replace(self, name: str) -> None:
        """Somebody deletes a TrainJob and makes another one of its name."""
        with self._lock:
            self.jobs[name] = {**self.jobs[name], "metadata": {**self.jobs[name]["metadata"], "uid": "another"}}

    def answer(self, method: str, address: str, body: Object) -> tuple[int, Any]:
        """Status and body of the answer to a request."""
        parts = urlsplit(address)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        with self._lock:
            if self.refused:
                return self.refused.pop(0), {"message": "the server is busy"}
            if found := _JOBS.match(parts.path):
                return self._answer_job(method, found["name"], query, body)
            if found := _CORE.match(parts.path):
                if found["name"]:
                    return self._answer_log(found["name"], query)
                if found["kind"] == "events":
                    return 200, {
                        "items": [{"message": text, "metadata": {}, "involvedObject": {}} for text in self.warnings]
                    }
                return 200, {"items": _select(self.pods, query)}
            return 404, {"message": f"no such path: {parts.path}"}

    def _answer_job(self, method: str, name: str | None, query: Object, body: Object) -> tuple[int, Any]:
        if method == "POST":
            meta = body["metadata"]
            if meta["name"] in self.jobs:
                return 409, {"message": f"trainjobs {meta['name']!r} already exists"}
            self.jobs[meta["name"]] = {**body, "metadata": {**meta, **self._metadata(meta["name"])}}
            return 201, self.jobs[meta["name"]]
        if name is None:
            return 200, {"items": _select(self.jobs, query)}
        if name not in self.jobs:
            return 404, {"message": f"trainjobs {name!r} not found"}
        meta = self.jobs[name]["metadata"]
        if method == "DELETE":
            if body["preconditions"]["uid"] != meta["uid"]:
                return 409, {"message": "the UID in the precondition does not match"}
            self.deleted.append(name)
            self.pods = {key: pod for key, pod in self.pods.items() if not key.startswith(f"{name}-")}
            return 200, self.jobs.pop(name)
        if method == "PATCH":
            if body["metadata"]["uid"] != meta["uid"]:
                return 422, {"message": "metadata.uid: field is immutable"}
            meta["labels"] |= body["metadata"]["labels"]
        return 200, self.jobs[name]

    def _answer_log(self, name: str, query: Object) -> tuple[int, Any]:
        if name not in self._logs:
            return 404, {"message": f"pods {name!r} not found"}
        lines = self._logs[name]
        if "sinceSeconds" in query:
            since = datetime.now(UTC) - timedelta(seconds=int(query["sinceSeconds"]))
            lines = [line for line in lines if datetime.fromisoformat(line[0]) >= since]
        if "tailLines" in query:
            lines = lines[-int(query["tailLines"]) :]
        texts = [f"{time} {text}" if query.get("timestamps") else text for time, text in lines]
        return 200, "".join(f"{text}\n" for text in texts)

    def _metadata(self, name: str) -> Object:
        created = _text(self._tick())
        return {"name": name, "namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": created}

    def _tick(self) -> datetime:
        self._clock += timedelta(microseconds=1)
        return self._clock


def _text(time: datetime) -> str:
    """RFC 3339 as Go writes it, without zeros at the end."""
    return f"{time:%Y-%m-%dT%H:%M:%S.%f}".rstrip("0").rstrip(".") + "Z"


def _status(state: Object) -> Object:
    return {"name": "node", "state": state, "image": "", "imageID": "", "ready": False, "restartCount": 0}


def _select(objects: dict[str, Object], query: Object) -> list[Object]:
    found = list(objects.values())
    for term in query.get("labelSelector", "").split(","):
        key, _, value = term.lstrip("!").partition("=")
        if term.startswith("!"):
            found = [one for one in found if key not in one["metadata"]["labels"]]
        elif term:
            found = [one for one in found if one["metadata"]["labels"].get(key) == value]
    return found


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trainer]:
    """The server; Airflow's connection `kubernetes_default` leads to it."""
    state = Trainer()
    with serve(lambda method, path, _, body: state.answer(method, path, body or {})) as address:
        connect_airflow(address, NAMESPACE, tmp_path, monkeypatch)
        yield state
