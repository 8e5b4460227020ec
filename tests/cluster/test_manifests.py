"""Stand-ins without a cluster: tests/k8s/test_manifests.py, tests/k8s/test_policies.py."""

import itertools
import json
import os
import secrets
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.world import Kubectl
from tests.k8s.rendering import K8S, RENDERS, render

VERBS = [  # verb, resource, allowed to who promotes
    ("get", "deployments/recall-worker", True),
    ("patch", "deployments/recall-worker", True),
    ("patch", "deployments/recall-adhoc", True),
    ("patch", "deployments/recall-api", False),
    ("create", "deployments", False),
    ("delete", "deployments/recall-worker", False),
    ("update", "deployments/recall-worker", False),
    ("list", "pods", True),
    ("delete", "pods", False),
    ("create", "pods", False),
    ("get", "pods --subresource=log", False),
    ("create", "pods --subresource=exec", False),
    ("list", "events", True),
    ("create", "events", False),
    ("get", "leases.coordination.k8s.io/urm-promotion", True),
    ("update", "leases.coordination.k8s.io/urm-promotion", True),
    ("update", "leases.coordination.k8s.io/another", False),
    ("create", "leases.coordination.k8s.io", False),
    ("get", "secrets", False),
    ("get", "configmaps", False),
    ("list", "nodes", False),
]
OF_AIRFLOW = {  # group and resource → what Airflow may do
    ("", "pods"): {"create", "get", "list", "patch", "delete"},
    ("", "pods/log"): {"get"},
    ("", "events"): {"list"},
    ("trainer.kubeflow.org", "trainjobs"): {"create", "get", "list", "patch", "delete"},
    ("batch", "jobs"): {"create", "get", "delete"},
}
ELSEWHERE = "system:serviceaccount:airflow-of-the-tests:airflow-worker"


@pytest.fixture(scope="module")
def empty(kubectl: Kubectl) -> Iterator[Kubectl]:
    """A namespace under `restricted` with nothing in it."""
    name = f"urm-test-{secrets.token_hex(3)}"
    kubectl("create", "namespace", name)
    kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    yield Kubectl(name)
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize(("base", "added"), RENDERS, ids=lambda value: value or "alone")
def test_the_api_server_takes_every_render(kubectl: Kubectl, empty: Kubectl, base: str, added: str) -> None:
    """As a dry run, into a namespace under `restricted`; kinds that the cluster does not know are left out."""
    kinds = {line.split()[-1] for line in kubectl("api-resources", "--no-headers").splitlines()}
    objects = [one for one in render(base, *[added] * bool(added)) if one["kind"] in kinds - {"Namespace"}]
    for one in objects:
        one["metadata"]["namespace"] = empty.namespace
    answer = empty("apply", "--server-side", "--dry-run=server", "--filename", "-", given=yaml.safe_dump_all(objects))
    assert len(answer.splitlines()) == len(objects)


@pytest.mark.parametrize(("verb", "resource", "allowed"), VERBS)
def test_who_promotes_may_do_this_and_nothing_else(namespace: Kubectl, verb: str, resource: str, allowed: bool) -> None:
    account = f"system:serviceaccount:{namespace.namespace}:urm-promotion"
    answer = namespace("auth", "can-i", verb, *resource.split(), "--as", account, fails=True)
    assert answer.split()[0] == ("yes" if allowed else "no")


@pytest.mark.parametrize(
    "account", ["recall-api", "recall-worker", "urm-data", "urm-training", "urm-tracking", "default"]
)
def test_other_accounts_may_do_nothing(namespace: Kubectl, account: str) -> None:
    name = f"system:serviceaccount:{namespace.namespace}:{account}"
    for verb, resource, _ in VERBS:
        assert namespace("auth", "can-i", verb, *resource.split(), "--as", name, fails=True).split()[0] == "no"


@pytest.fixture(scope="module")
def airflow(empty: Kubectl, tmp_path_factory: pytest.TempPathFactory) -> Kubectl:
    """The component airflow, bound as its README says to an account of another namespace, too."""
    folder = tmp_path_factory.mktemp("kustomize")
    subject = {"kind": "ServiceAccount", "namespace": "airflow-of-the-tests", "name": "airflow-worker"}
    patch = yaml.safe_dump([{"op": "add", "path": "/subjects/-", "value": subject}])
    kustomization = {
        "namespace": empty.namespace,
        "components": [os.path.relpath(K8S / "components" / "airflow", folder)],
        "patches": [{"target": {"kind": "RoleBinding", "name": "urm-airflow"}, "patch": patch}],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    empty("apply", "--server-side", "--kustomize", str(folder))
    return empty


def test_airflow_may_do_this_and_nothing_else(airflow: Kubectl) -> None:
    usual = read_rights(airflow, f"system:serviceaccount:{airflow.namespace}:default")
    for account in (f"system:serviceaccount:{airflow.namespace}:urm-airflow", ELSEWHERE):
        assert read_rights(airflow, account) == usual | OF_AIRFLOW


def read_rights(kubectl: Kubectl, account: str) -> dict[tuple[str, str], set[str]]:
    """Verbs by group and resource that an account is allowed in a namespace, as the API server says."""
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview"}
    given = json.dumps({**review, "spec": {"namespace": kubectl.namespace}})
    options = ("--validate=false", "--filename", "-", "--output", "json")
    answer = json.loads(kubectl("create", *options, "--as", account, given=given))
    rights: dict[tuple[str, str], set[str]] = {}
    for rule in answer["status"]["resourceRules"]:
        assert not rule.get("resourceNames")
        for place in itertools.product(rule["apiGroups"], rule["resources"]):
            rights.setdefault(place, set()).update(rule["verbs"])
    return rights


def test_a_pod_that_breaks_the_standard_is_refused(namespace: Kubectl) -> None:
    container = {"name": "a", "image": "urm-recall-api:0.1.0", "securityContext": {"privileged": True}}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "root"}, "spec": {"containers": [container]}}
    answer = namespace("apply", "--server-side", "--filename", "-", given=yaml.safe_dump(pod), fails=True)
    assert 'violates PodSecurity "restricted' in answer
