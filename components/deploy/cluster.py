"""The calls of the Kubernetes API that a promotion makes: all that the role `urm-promotion` allows.

Objects are plain dictionaries with the API's own names, as `kubectl get -o json` shows them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import urllib3
from kubernetes.client import ApiClient, Configuration
from kubernetes.client.exceptions import ApiException
from kubernetes.config import ConfigException, load_incluster_config, load_kube_config

from components.exceptions import ConfigError, MissingInputError, ReleaseError, UnavailableError

Object = dict[str, Any]
MANAGER = "urm-promotion"  # owner of what a promotion applies
_TIMEOUT_SECONDS = 10.0


class ConflictError(Exception):
    """The object has changed since it was read."""


class Cluster:
    """One namespace of a cluster. Every call raises one sentence where the API refuses or does not answer."""

    def __init__(self, api: ApiClient, namespace: str) -> None:
        self._api = api
        self.namespace = namespace

    @classmethod
    def open(cls, namespace: str) -> "Cluster":
        """The cluster that this process runs in, else the one that KUBECONFIG names.

        Raises:
            ConfigError: There is neither.
        """
        configuration = Configuration()
        try:
            try:
                load_incluster_config(client_configuration=configuration)
            except ConfigException:
                load_kube_config(client_configuration=configuration)
        except ConfigException as error:
            raise ConfigError(
                "Kubernetes",
                expected="the token of a service account, or a file that KUBECONFIG names",
                got=error,
                remedy="set KUBECONFIG, or unset URM_DEPLOY_TO to promote on this machine",
            ) from None
        return cls(ApiClient(configuration), namespace)

    def read_deployment(self, name: str) -> Object:
        """A Deployment."""
        return self._call("GET", "/apis/apps/v1", "deployments", name)

    def apply_deployment(self, name: str, metadata: Object, spec: Object) -> Object:
        """Server-side apply of a part of a Deployment; with a resourceVersion in its metadata only to that version.

        Raises:
            ConflictError: The Deployment has another version.
        """
        body = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, **metadata}, "spec": spec}
        query = {"fieldManager": MANAGER, "force": "true"}
        kind = "application/apply-patch+yaml"  # JSON is YAML
        return self._call("PATCH", "/apis/apps/v1", "deployments", name, query, body, kind)

    def list_pods(self, labels: Mapping[str, str]) -> list[Object]:
        """Pods with these labels."""
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        items: list[Object] = self._call("GET", "/api/v1", "pods", query={"labelSelector": selector})["items"]
        return items

    def list_warnings(self, name: str) -> list[str]:
        """What the cluster has warned of about an object of that name, oldest first."""
        query = {"fieldSelector": f"involvedObject.name={name},type=Warning"}
        items = self._call("GET", "/api/v1", "events", query=query)["items"]
        items.sort(key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")
        return [event.get("message", "") for event in items]

    def read_lease(self, name: str) -> Object:
        """A Lease."""
        return self._call("GET", "/apis/coordination.k8s.io/v1", "leases", name)

    def replace_lease(self, name: str, lease: Object) -> Object:
        """Write a Lease as it was read, with changes.

        Raises:
            ConflictError: It has changed since it was read.
        """
        return self._call("PUT", "/apis/coordination.k8s.io/v1", "leases", name, body=lease)

    def _call(
        self,
        method: str,
        group: str,
        kind: str,
        name: str = "",
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        path = "/".join(part for part in (group, "namespaces", self.namespace, kind, name) if part)
        with _one_sentence(f"{kind.removesuffix('s')} {name}".strip(), self.namespace):
            found: Object = self._api.call_api(
                path,
                method,
                query_params=list((query or {}).items()),
                header_params={"Accept": "application/json", "Content-Type": content_type},
                body=body,
                response_types_map={200: "object", 201: "object"},
                auth_settings=["BearerToken"],
                _return_http_data_only=True,
                _request_timeout=_TIMEOUT_SECONDS,
            )
        return found


@contextmanager
def _one_sentence(subject: str, namespace: str) -> Iterator[None]:
    """Turn what the client raises into one sentence.

    Raises:
        ConflictError: The object has changed since it was read.
        MissingInputError: It is not there.
        ReleaseError: The API refuses.
        UnavailableError: The API does not answer, or cannot now.
    """
    try:
        yield
    except ApiException as error:
        if error.status == 409:
            raise ConflictError from None
        got = _message(error)
        if error.status == 404:
            expected, remedy = f"it in namespace {namespace}", "apply the manifests of k8s/ first"
            raise MissingInputError(subject, expected=expected, got="nothing", remedy=remedy) from None
        if error.status in (400, 401, 403, 422):
            expected, remedy = "the rights of the role urm-promotion", "promote with its service account"
            raise ReleaseError(subject, expected=expected, got=got, remedy=remedy) from None
        raise _no_answer(got) from None
    except (urllib3.exceptions.HTTPError, OSError) as error:
        raise _no_answer(error) from None


def _no_answer(got: object) -> UnavailableError:
    return UnavailableError("Kubernetes API", expected="an answer", got=got, remedy="try again when it answers")


def _message(error: ApiException) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"status {error.status}, {error.reason}"
