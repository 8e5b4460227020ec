"""A stand-in for the API server where there is no cluster: a real HTTP server that keeps pods and their logs.

It gives them uids and times, finds them by labels, deletes under a precondition; a test says what becomes of them.
"""

import copy
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

__all__ = ["pod_server"]  # fixtures

_PATH = re.compile(r"/api/v1/namespaces/(?P<namespace>[\w-]+)/pods(/(?P<name>[\w-]+)(?P<log>/log)?)?$")
Object = dict[str, Any]


def time(ago: float = 0) -> str:
    """A time of the API, some seconds ago."""
    return (datetime.now(UTC) - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


def scheduled(ago: float = 0) -> Object:
    return {"type": "PodScheduled", "status": "True", "lastTransitionTime": time(ago)}


def base(**state: Object) -> list[Object]:
    """Status of the container."""
    status = {"name": "base", "state": state, "image": "", "imageID": "", "ready": False, "restartCount": 0}
    return [status]


def running() -> Object:
    return {
        "phase": "Running",
        "conditions": [scheduled()],
        "containerStatuses": base(running={"startedAt": time()}),
    }


def waiting(reason: str, message: str, ago: float = 0) -> Object:
    """Of a container that waits on its node."""
    state = base(waiting={"reason": reason, "message": message})
    return {"phase": "Pending", "conditions": [scheduled(ago)], "containerStatuses": state}


def ended(exit_code: int, reason: str = "", message: str = "", **status: Any) -> Object:
    """Of a program that ended by itself, and what else Kubernetes says about its pod."""
    end = {"exitCode": exit_code, "reason": reason or ("Error" if exit_code else "Completed"), "message": message}
    phase = "Failed" if exit_code else "Succeeded"
    found = {"phase": phase, "conditions": [scheduled()], "containerStatuses": base(terminated=end)}
    return found | status


def evicted() -> Object:
    """By the API: the pod has got its condition, its program was asked to stop, and its node has said so."""
    target = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "evicting"}
    return ended(143, conditions=[scheduled(), target])


class PodServer:
    """Pods by name.

    Attributes:
        next: Statuses of the pods to come, one each; the last one's stays.
        logs: Lines of the log by pod, with their times.
        untimed: What the node says after them.
        created: Every pod that was asked for, in order.
        deleted: Name and uid of every pod that was deleted.
        refused: Statuses and messages with which the next requests of a method are answered.
    """

    def __init__(self) -> None:
        self.next: list[Object] = [running()]
        self.logs: dict[str, list[tuple[datetime, str]]] = {}
        self.untimed = ""
        self.created: list[Object] = []
        self.deleted: list[tuple[str, str]] = []
        self.refused: dict[str, list[tuple[int, str]]] = {}
        self.pods: dict[str, Object] = {}
        self._lock = threading.RLock()

    def add(self, pod: Object, status: Object) -> Object:
        """A pod as if it had been created; returns it."""
        with self._lock:
            made = copy.deepcopy(pod)
            made["metadata"] |= {"uid": str(uuid.uuid4()), "creationTimestamp": time(), "namespace": "urm"}
            made["status"] = status
            made["spec"]["nodeName"] = "node-1"
            self.pods[made["metadata"]["name"]] = made
            return made

    def write(self, name: str, *lines: str, at: datetime | None = None) -> None:
        """The program writes lines, a microsecond apart."""
        with self._lock:
            start = at or datetime.now(UTC)
            log = self.logs.setdefault(name, [])
            log += [(start + timedelta(microseconds=number), line) for number, line in enumerate(lines)]

    def answer(self, method: str, address: str, body: Any) -> tuple[int, Object | str]:
        """Status and body of the answer to a request."""
        parts = urlsplit(address)
        found = _PATH.match(parts.path)
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        with self._lock:
            if self.refused.get(method):
                status, message = self.refused[method].pop(0)
                return status, {"kind": "Status", "message": message}
            if found is None:
                return 404, {"message": f"no such path: {parts.path}"}
            if found["name"] is None:
                return self._create(body) if method == "POST" else (200, self._list(query))
            pod = self.pods.get(found["name"])
            if pod is None:
                return 404, {"message": f"pods {found['name']!r} not found"}
            if found["log"]:
                return 200, self._log(found["name"], query)
            if method == "DELETE":
                return self._delete(pod, body)
            if method == "PATCH":
                if body["metadata"]["uid"] != pod["metadata"]["uid"]:
                    return 409, {"message": "the uid is another"}
                pod["metadata"].setdefault("annotations", {}).update(body["metadata"]["annotations"])
            return 200, pod

    def _create(self, body: Object) -> tuple[int, Object]:
        if body["metadata"]["name"] in self.pods:
            return 409, {"message": "already exists"}
        self.created.append(body)
        return 201, self.add(body, self.next.pop(0) if len(self.next) > 1 else self.next[0])

    def _list(self, query: dict[str, str]) -> Object:
        wanted = dict(pair.split("=") for pair in query["labelSelector"].split(","))
        return {"items": [pod for pod in self.pods.values() if wanted.items() <= pod["metadata"]["labels"].items()]}

    def _delete(self, pod: Object, body: Object) -> tuple[int, Object]:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        if body["preconditions"]["uid"] != uid:
            return 409, {"message": "the uid is another"}
        del self.pods[name]
        self.deleted.append((name, uid))
        return 200, pod

    def _log(self, name: str, query: dict[str, str]) -> str:
        assert query["timestamps"] in ("True", "true")
        since = datetime.now(UTC) - timedelta(seconds=int(query.get("sinceSeconds", 10**9)))
        lines = [(at, line) for at, line in self.logs.get(name, []) if at >= since]
        return "".join(f"{at.strftime('%Y-%m-%dT%H:%M:%S.%f')}000Z {line}\n" for at, line in lines) + self.untimed


@pytest.fixture
def pod_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PodServer]:
    """The server; Airflow's connection leads to it."""
    state = PodServer()
    with serve(lambda method, path, _, body: state.answer(method, path, body)) as address:
        connect_airflow(address, "urm", tmp_path, monkeypatch)
        yield state
