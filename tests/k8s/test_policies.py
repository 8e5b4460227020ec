"""The manifests keep the policies, and every policy finds what is planted against it."""

from typing import Any

import pytest

from components.config import load_config
from components.flow import STAGES
from components.recall.state.scripts import GROUP, STREAM
from tests.k8s import policies
from tests.k8s.rendering import (
    COMPONENTS,
    RENDERS,
    Object,
    is_selected,
    needs_kubectl,
    of_kind,
    read_components,
    render,
)
from tests.worlds import CONFIGS

pytestmark = needs_kubectl
ALL_ADDED = [name for name in COMPONENTS if name not in read_components("production")]
API, WORKER, ADHOC = "Deployment/recall-api", "Deployment/recall-worker", "Deployment/recall-adhoc"
POD, FIRST = "spec.template.spec", "spec.template.spec.containers.0"
INTO = "spec.ingress.0.from"
DRIVERS = [stage for stage in STAGES if STAGES[stage].spark]
SECONDS_PER_POD = 30  # to verify and load the demo's release (docs/kubernetes.md)
GONE = object()
# By policy: object, place in it, what is put there, the fault.
PLANTED: dict[policies.Policy, list[tuple[str, str, Any, str]]] = {
    policies.objects_are_labelled: [
        (API, "metadata.labels", {}, "no label"),
        (API, "metadata.namespace", "default", "not in the namespace"),
        ("Namespace/urm", "metadata.labels.pod-security\\.kubernetes\\.io/enforce", "baseline", "does not enforce"),
    ],
    policies.pods_are_hardened: [
        (WORKER, f"{POD}.securityContext.runAsNonRoot", GONE, "as root"),
        (WORKER, f"{POD}.securityContext.runAsUser", 0, "as root"),
        (WORKER, f"{POD}.securityContext.seccompProfile", GONE, "no seccomp"),
        ("StatefulSet/redis", f"{POD}.automountServiceAccountToken", GONE, "has a token"),
        (API, f"{POD}.enableServiceLinks", GONE, "variables of every service"),
        (API, f"{POD}.hostNetwork", True, "uses hostNetwork"),
    ],
    policies.volumes_are_bounded: [
        (API, f"{POD}.volumes.0", {"name": "x", "hostPath": {"path": "/"}}, "path of the node"),
        (WORKER, f"{POD}.volumes.0.emptyDir", {}, "volume cache has no limit"),
    ],
    policies.containers_are_hardened: [
        (WORKER, f"{FIRST}.securityContext.allowPrivilegeEscalation", GONE, "gain privileges"),
        (WORKER, f"{FIRST}.securityContext.privileged", True, "gain privileges"),
        (WORKER, f"{FIRST}.securityContext.readOnlyRootFilesystem", False, "into its image"),
        (WORKER, f"{POD}.initContainers.0.securityContext.capabilities", GONE, "capabilities"),
    ],
    policies.containers_are_limited_and_named: [
        (WORKER, f"{FIRST}.resources.limits.memory", GONE, "no limits of memory"),
        (API, f"{FIRST}.resources.requests", GONE, "no requests of cpu"),
        (API, f"{FIRST}.image", "r.example:5000/urm-recall-api", "no fixed tag"),
        (API, f"{FIRST}.image", "urm-recall-api:latest", "no fixed tag"),
        (WORKER, f"{POD}.initContainers.0.terminationMessagePolicy", "File", "why it ended"),
    ],
    policies.containers_are_probed: [
        ("StatefulSet/redis", f"{FIRST}.startupProbe", GONE, "no startupProbe"),
        (WORKER, f"{FIRST}.readinessProbe.httpGet.path", "/healthz", "is ready by /healthz"),
        (API, f"{FIRST}.readinessProbe.httpGet.path", "/readyz", "is ready by /readyz"),
    ],
    policies.rollouts_lose_nothing: [
        (WORKER, "spec.strategy.rollingUpdate.maxUnavailable", 1, "takes a pod away"),
        (WORKER, "spec.progressDeadlineSeconds", GONE, "no deadline"),
        (WORKER, "spec.replicas", 3, "replicas and an autoscaler"),
        (ADHOC, "spec.replicas", GONE, "or neither"),
        ("HorizontalPodAutoscaler/recall-api", "spec.scaleTargetRef.name", "api", "no such"),
        (
            "PodDisruptionBudget/recall-api",
            "spec.selector.matchLabels",
            {"app.kubernetes.io/name": "urm"},
            "recall-worker has no disruption budget of its own",
        ),
        (API, f"{POD}.topologySpreadConstraints", [], "not spread"),
        (WORKER, f"{POD}.terminationGracePeriodSeconds", 20, "killed before"),
        (API, f"{POD}.terminationGracePeriodSeconds", 70, "killed before"),
        (API, f"{FIRST}.lifecycle", GONE, "waits 0 s"),
    ],
    policies.selectors_choose_pods: [
        ("Service/recall-api", "spec.selector", {"app": "recall-api"}, "selects nothing"),
        (API, "spec.selector.matchLabels", {"app.kubernetes.io/name": "urm"}, "selects pods of"),
        (API, "spec.selector.matchLabels.app\\.kubernetes\\.io/version", "1", "by a version"),
        (
            "NetworkPolicy/promoter",
            "spec.egress.1.to.0.podSelector.matchLabels",
            {"app": "mlflow"},
            "egress 1 selects nothing",
        ),
        ("PodMonitor/urm-recall", "spec.selector.matchExpressions.0.values", ["api"], "selects nothing"),
    ],
    policies.references_exist: [
        (WORKER, f"{POD}.serviceAccountName", "default", "ServiceAccount default"),
        (WORKER, f"{FIRST}.envFrom.0.configMapRef.name", "settings", "ConfigMap settings"),
        (WORKER, f"{FIRST}.envFrom.1.secretRef.name", "credentials", "Secret credentials"),
        (API, f"{POD}.volumes.0.secret.secretName", "tokens", "Secret tokens"),
        (API, f"{FIRST}.volumeMounts.0.name", "nothing", "volume of"),
        ("RoleBinding/urm-promotion", "subjects.0.name", "nobody", "ServiceAccount nobody"),
        ("StatefulSet/redis", "spec.serviceName", "valkey", "Service valkey"),
        ("ScaledObject/recall-worker", "spec.triggers.0.authenticationRef.name", "x", "TriggerAuthentication x"),
        ("TriggerAuthentication/urm-keda-redis", "spec.secretTargetRef.0.name", "x", "Secret x"),
        ("ExternalSecret/recall-tokens", "spec.secretStoreRef.name", "x", "ClusterSecretStore x"),
        ("HTTPRoute/recall-api", "spec.rules.0.backendRefs.0.name", "api", "Service api"),
    ],
    policies.commands_listen_where_declared: [
        (WORKER, f"{FIRST}.livenessProbe.httpGet.port", "http", "asks port http"),
        (WORKER, f"{FIRST}.args.3", "3", "listens on [9100, 9101, 9102, 9103]"),
        (API, f"{FIRST}.ports.1.containerPort", 9001, "declared are other ports"),
    ],
    policies.ports_are_served: [
        ("Service/recall-api", "spec.ports.0.targetPort", "health", "leads to port health"),
        ("HTTPRoute/recall-api", "spec.rules.0.backendRefs.0.port", 80, "leads to port 80"),
        (
            "PodMonitor/urm-recall",
            "spec.podMetricsEndpoints.0.relabelings.0.regex",
            "metrics",
            "scrapes ['metrics'] of",
        ),
        ("NetworkPolicy/to-recall-api", "spec.ingress.0.ports.0.port", 9100, "opens port 9100"),
        ("NetworkPolicy/promoter", "spec.egress.2.ports.0.port", 80, "opens port 80"),
    ],
    policies.edges_are_open_at_both_ends: [
        ("NetworkPolicy/into-mlflow", "spec.podSelector.matchLabels", {"x": "y"}, "lets sft out to mlflow, which does"),
        ("NetworkPolicy/into-mlflow", "spec.ingress.0.ports.0.port", 80, "which does not let it in at port 5000"),
        ("NetworkPolicy/into-mlflow", f"{INTO}.0.podSelector", {"matchLabels": {"x": "y"}}, "lets gate out to mlflow"),
        ("NetworkPolicy/to-recall-api", f"{INTO}.1", GONE, "lets promote out to recall-api"),
        ("NetworkPolicy/spark", "spec.ingress.0.ports", [{"port": 80}], "which does not let it in at every port"),
        ("NetworkPolicy/ranks", "spec.ingress", GONE, "lets sft out to sft"),
    ],
    policies.releases_come_from_promotion: [
        (WORKER, "spec.template.metadata.annotations", {"urm.release/name": "r1"}, "annotation urm.release/name"),
        (WORKER, "metadata.annotations", {"kubernetes.io/change-cause": "x"}, "annotation kubernetes.io/change-cause"),
        ("Lease/urm-promotion", "spec", {"holderIdentity": "x"}, "has a holder"),
        (WORKER, f"{POD}.initContainers.0.env.0", {"name": "URM_RELEASE", "value": "r"}, "does not read its release"),
        (WORKER, f"{POD}.initContainers", [], "does not verify"),
    ],
    policies.only_who_needs_them_has_rights: [
        ("Role/urm-promotion", "rules.0.verbs", ["*"], "Role/urm-promotion allows other"),
        ("Role/urm-promotion", "rules.0.resourceNames", GONE, "Role/urm-promotion allows other"),
        ("Role/urm-promotion", "kind", "ClusterRole", "ClusterRole/urm-promotion allows other"),
        ("Role/urm-promotion", "metadata.name", "urm-data", "there are roles ['urm-airflow', 'urm-data', 'urm-spark']"),
        ("Role/urm-airflow", "rules.1.resources", ["pods/log", "pods/exec"], "Role/urm-airflow allows other"),
        ("RoleBinding/urm-promotion", "subjects.0.name", "urm-data", "bound as"),
        ("Role/urm-spark", "rules.0.resources", ["pods", "configmaps", "secrets"], "Role/urm-spark allows other"),
        ("RoleBinding/urm-airflow", "kind", "ClusterRoleBinding", "bound as"),
        ("ServiceAccount/urm-data", "automountServiceAccountToken", GONE, "its token"),
    ],
    policies.credentials_go_to_their_class: [
        (WORKER, f"{FIRST}.envFrom.1.secretRef.name", "urm-training", "recall-worker gets the secret urm-training"),
        (WORKER, f"{POD}.serviceAccountName", "urm-data", "urm-data gets the secret urm-credentials"),
        (API, f"{POD}.volumes.0.secret.secretName", "urm-promotion", "recall-api gets the secret urm-promotion"),
        (
            API,
            f"{FIRST}.env.0",
            {"name": "X", "valueFrom": {"secretKeyRef": {"name": "urm-tracking", "key": "X"}}},
            "recall-api gets the secret urm-tracking",
        ),
    ],
    policies.commands_exist: [
        (WORKER, f"{FIRST}.args.1", "runners", "runners"),
        (WORKER, f"{FIRST}.args.2", "--copies", "--copies"),
        (WORKER, f"{FIRST}.args.3", "many", "many"),
    ],
    policies.settings_are_read: [
        (API, f"{FIRST}.volumeMounts.0.mountPath", "/etc/urm", "URM_API_TOKENS_FILE=/etc/urm/tokens/tokens.json lies"),
        ("ConfigMap/urm-settings", "data.URM_RUNS_URL", "x", "URM_RUNS_URL is no setting"),
        ("ConfigMap/urm-settings", "data.URM_DEPLOY_TO", "cluster", "deploy_to"),
        (WORKER, f"{FIRST}.env.0.name", "URM_RELEASES", "URM_RELEASES is no setting"),
    ],
}


def _plant(objects: list[Object], name: str, place: str, value: Any) -> None:
    """Put a value at a place, or take out what is there; steps are parted by dots, a dot in a step is escaped."""
    target: Any = next(one for one in objects if f"{one['kind']}/{one['metadata']['name']}" == name)
    *steps, last = (step.replace("\0", ".") for step in place.replace("\\.", "\0").split("."))
    for step in steps:
        target = target[int(step)] if isinstance(target, list) else target.setdefault(step, {})
    key = int(last) if isinstance(target, list) else last
    if value is GONE:
        del target[key]
    else:
        target[key] = value


@pytest.mark.parametrize(("base", "added"), RENDERS)
def test_manifests_keep_the_policies(base: str, added: str) -> None:
    assert policies.find_faults(render(base, *filter(None, [added]))) == []


def test_all_components_go_together() -> None:
    assert policies.find_faults(render("production", *ALL_ADDED)) == []


@pytest.mark.parametrize(
    ("policy", "name", "place", "value", "fault"),
    [(policy, *planted) for policy, every in PLANTED.items() for planted in every],
)
def test_planted_fault_is_found(policy: policies.Policy, name: str, place: str, value: Any, fault: str) -> None:
    objects = render("production", *ALL_ADDED)
    _plant(objects, name, place, value)
    assert fault in "\n".join(policy(objects))


def test_every_policy_has_a_planted_fault() -> None:
    assert list(PLANTED) == list(policies.POLICIES)


def test_what_is_declared_external_is_named_somewhere() -> None:
    objects = render("production", *ALL_ADDED)
    named = {(kind, target) for _, kind, target in policies.find_references(objects)}
    assert {(kind, name) for kind, names in policies.EXTERNAL.items() for name in names} - named == set()


def test_the_backlog_is_that_of_the_workers() -> None:
    [scaled] = of_kind(render("base", "keda"), "ScaledObject")
    backlog, pending = (trigger["metadata"] for trigger in scaled["spec"]["triggers"])
    assert (backlog["stream"], pending["stream"], pending["consumerGroup"]) == (STREAM, STREAM, GROUP)
    assert "consumerGroup" not in backlog  # with one, KEDA counts what is pending instead
    assert scaled["spec"]["minReplicaCount"] >= 1  # a worker makes the group


def test_a_promotion_in_production_has_time_for_all_pods_that_there_may_be() -> None:
    objects = render("production")
    [scaled] = of_kind(objects, "ScaledObject")
    [named] = [one["data"]["URM_CONFIG"] for one in of_kind(objects, "ConfigMap") if "URM_CONFIG" in one["data"]]
    timeout = load_config(CONFIGS / f"{named}.yaml").release.promote_timeout_seconds
    assert timeout > 2 * SECONDS_PER_POD * scaled["spec"]["maxReplicaCount"]  # one after another, of a larger release
    # The stage may wait for the promotion before it, for what that left half done, and for its own pods.
    assert 3 * timeout < STAGES["promote"].resources.hours * 3600


def test_a_task_reaches_what_its_class_needs() -> None:
    """Ports by the policies of egress; the ranks of `sft`, and Spark's pods, reach one another at every port."""
    egress = [one["spec"] for one in of_kind(render("production"), "NetworkPolicy") if "egress" in one["spec"]]
    store, tracking = {53, 443}, {53, 443, 5000}
    wanted = {"urm-data": store, "urm-training": tracking, "urm-tracking": tracking}
    wanted["urm-promotion"] = {*tracking, 6379, 6443, 8000}
    reached = {task: wanted[name] for name, tasks in policies.CLASSES.items() for task in tasks}
    reached |= {stage: {*store, 6443} for stage in DRIVERS}
    for task, ports in {**reached, "recall-backfill": {*store, 6379}}.items():
        started = {} if task == "recall-backfill" else policies.STARTED_BY_AIRFLOW
        labels = {"app.kubernetes.io/component": task, **started}
        rules = [rule for spec in egress if is_selected(labels, spec["podSelector"]) for rule in spec["egress"]]
        assert {port["port"] for rule in rules for port in rule.get("ports", [])} == ports
        peers = [peer["podSelector"] for rule in rules if "ports" not in rule for peer in rule["to"]]
        spread = {"sft": ["sft"], **{stage: [*DRIVERS, "spark-executor"] for stage in DRIVERS}}.get(task, [])
        for component in {*reached, "spark-executor"}:
            meets = any(is_selected({"app.kubernetes.io/component": component}, peer) for peer in peers)
            assert meets is (component in spread)
