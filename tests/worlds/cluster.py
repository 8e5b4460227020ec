"""A stand-in for the API server where there is no cluster: a real HTTP server with what a promotion relies on.

Versions of objects and refused writes to an old one, server-side apply with owners of fields, generations, and a
controller that makes the pods of a Deployment what a test says. kmock, which the field has for this, keeps objects
without versions or owners, and just these are what the tests are about.
"""

import copy
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from kubernetes.client import ApiClient, Configuration

from components.deploy.cluster import Cluster, Object
from components.deploy.kubernetes import DEPLOYMENTS
from components.deploy.lease import NAME as LEASE
from tests.worlds.http_server import serve

__all__ = ["api_server"]  # fixtures

NAMESPACE = "urm"
_PATH = re.compile(r"/apis?(/\S+)?/v1/namespaces/urm/(?P<kind>\w+)(/(?P<name>[\w-]+))?$")
Pod = Callable[[str], Object]  # from its name, the status of a pod
_Leaf = tuple[str, ...]


def ready(_: str) -> Object:
    return {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


def unready(_: str) -> Object:
    return {"phase": "Running", "conditions": [{"type": "Ready", "status": "False"}]}


class ApiServer:
    """Two Deployments, their pods and one Lease.

    Attributes:
        pods: What becomes of the new pods of a release, by its name; they are ready where none is named.
        warnings: Messages of events by the name of the object.
        refused: Statuses with which the next requests of a method are answered, e.g. {"GET": [503, 503]}.
        written: Kind and name of every object that was written, in order.
    """

    def __init__(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.warnings: dict[str, list[str]] = {}
        self.refused: dict[str, list[int]] = {}
        self.written: list[str] = []
        self._objects: dict[tuple[str, str], Object] = {}
        self._owned: dict[tuple[str, str, str], set[_Leaf]] = {}
        self._version, self._lock = 0, threading.RLock()
        self._store("leases", {"metadata": {"name": LEASE, "labels": {"app": "urm"}}})
        for name in DEPLOYMENTS:
            template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "recall"}]}}
            spec = {"replicas": 1, "selector": {"matchLabels": {"app": name}}, "template": template}
            self._store("deployments", {"metadata": {"name": name, "generation": 1}, "spec": spec})
            self._control(name)

    def read(self, name: str, kind: str = "deployments") -> Object:
        """An object as it is now."""
        with self._lock:
            return copy.deepcopy(self._objects[kind, name])

    def template(self, name: str) -> dict[str, str]:
        """Annotations of a pod template."""
        found: dict[str, str] = self.read(name)["spec"]["template"]["metadata"].get("annotations", {})
        return found

    def notes(self, name: str) -> dict[str, str]:
        """Annotations of a Deployment."""
        found: dict[str, str] = self.read(name)["metadata"].get("annotations", {})
        return found

    def roll_back_by_hand(self, name: str, before: Object) -> None:
        """What `kubectl rollout undo` does: the former template, and the notes of its ReplicaSet."""
        with self._lock:
            now = self._objects["deployments", name]
            now["spec"]["template"] = copy.deepcopy(before["spec"]["template"])
            now["metadata"]["annotations"] = dict(before["metadata"].get("annotations", {}))
            now["metadata"]["generation"] += 1
            self._store("deployments", now)
            self._control(name)

    def scale(self, name: str, replicas: int) -> None:
        with self._lock:
            self._objects["deployments", name]["spec"]["replicas"] = replicas
            self._control(name)

    def answer(self, method: str, address: str, kind_of_body: str, body: Any) -> tuple[int, Object]:
        """Status and body of the answer to a request."""
        parts = urlsplit(address)
        found = _PATH.match(parts.path)
        if found is None:
            return 404, {"message": f"no such path: {parts.path}"}
        kind, name, query = found["kind"], found["name"], parse_qs(parts.query)
        with self._lock:
            if self.refused.get(method):
                return self.refused[method].pop(0), {"message": "the server is busy"}
            if name is None:
                return 200, {"items": self._list(kind, query)}
            if (kind, name) not in self._objects:
                return 404, {"message": f"{kind} {name!r} not found"}
            if method != "GET":
                sent, there = body["metadata"].get("resourceVersion"), self._objects[kind, name]["metadata"]
                if sent not in (None, there["resourceVersion"]):
                    return 409, {"message": "the object has been modified"}
                if method == "PATCH":
                    assert kind_of_body == "application/apply-patch+yaml" and query["force"] == ["true"]
                    self._apply(name, body, query["fieldManager"][0])
                else:
                    self._store(kind, body)
                self.written.append(f"{kind} {name}")
            return 200, self.read(name, kind)

    def _list(self, kind: str, query: Mapping[str, list[str]]) -> list[Object]:
        if kind == "events":
            name = re.match(r"involvedObject\.name=([\w-]+),type=Warning$", query["fieldSelector"][0])
            texts = self.warnings.get(name[1] if name else "", [])
            return [{"message": text, "lastTimestamp": f"2026-01-01T00:00:0{at}Z"} for at, text in enumerate(texts)]
        key, _, value = query["labelSelector"][0].partition("=")
        found = [one for (of, _), one in self._objects.items() if of == kind]
        return [copy.deepcopy(one) for one in found if one["metadata"]["labels"].get(key) == value]

    def _apply(self, name: str, body: Object, manager: str) -> None:
        """Set the fields of the body, and take those away that the manager alone had set before."""
        now, owned = self._objects["deployments", name], self._owned.setdefault(("deployments", name, manager), set())
        was = copy.deepcopy(now["spec"])
        fields = {path: value for path, value in _leaves(body) if path[0] == "spec" or path[1] == "annotations"}
        for path in owned - set(fields):
            _parent(now, path).pop(path[-1], None)
        for path, value in fields.items():
            _parent(now, path)[path[-1]] = value
        self._owned["deployments", name, manager] = set(fields)
        now["metadata"]["generation"] += now["spec"] != was
        self._store("deployments", now)
        if now["spec"] != was:
            self._control(name)

    def _control(self, name: str) -> None:
        """The controllers and the kubelet: old pods stay until the new ones are ready."""
        now = self._objects["deployments", name]
        spec, metadata = now["spec"], now["metadata"]
        annotations = dict(spec["template"]["metadata"].get("annotations", {}))
        make = self.pods.get(annotations.get("urm.release/name", ""), ready)
        count, number = spec["replicas"], metadata["generation"]
        names = [f"{name}-{number}-{at}" for at in range(count)]
        good = all(make(one) == ready(one) for one in names)
        for key in [key for key in self._objects if key[0] == "pods" and key[1].startswith(f"{name}-") and good]:
            del self._objects[key]
        for one in names if good else names[:1]:
            owner = {"name": one, "labels": {"app": name}, "annotations": annotations}
            pod_spec = {"containers": [{"name": "recall", "resources": {"limits": {"memory": "1Gi"}}}]}
            self._store("pods", {"metadata": owner, "spec": pod_spec, "status": make(one)})
        updated = count if good else 1
        now["status"] = {
            "observedGeneration": number,
            "updatedReplicas": updated,
            "replicas": count if good else count + 1,
            "availableReplicas": count,
        }
        self._store("deployments", now)

    def _store(self, kind: str, found: Object) -> None:
        self._version += 1
        metadata = {**found["metadata"], "namespace": NAMESPACE, "resourceVersion": str(self._version)}
        self._objects[kind, metadata["name"]] = {**copy.deepcopy(found), "metadata": metadata}


def _leaves(value: Object, path: _Leaf = ()) -> Iterator[tuple[_Leaf, Any]]:
    for key, below in value.items():
        if isinstance(below, dict):
            yield from _leaves(below, (*path, key))
        elif path:
            yield (*path, key), below


def _parent(found: Object, path: _Leaf) -> Object:
    for key in path[:-1]:
        found = found.setdefault(key, {})
    return found


@pytest.fixture
def api_server() -> Iterator[tuple[ApiServer, Callable[[], Cluster]]]:
    """The server, and a function that connects to it."""
    state = ApiServer()
    with serve(state.answer) as address:
        yield state, lambda: Cluster(ApiClient(Configuration(host=address)), NAMESPACE)
