"""Rules over rendered manifests. Each takes all objects and yields a sentence per fault."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise, product
from pathlib import Path
from typing import get_args

import typer
from pydantic import ValidationError

from components.cli.app import app
from components.config.sections import RecallConfig
from components.flow import STAGES, Access
from components.recall.process.supervisor import GRACE_SECONDS
from components.settings import Settings
from tests.k8s.rendering import (
    Object,
    containers_of,
    is_selected,
    names_of,
    of_kind,
    pod_specs,
    ports_of,
)

_UsageError = typer.BadParameter.__base__ or Exception  # of unknown options, too; typer has no public name for it
Policy = Callable[[list[Object]], Iterator[str]]
# Account and secret of each class of stages, with its tasks: the label `component` of their pods.
CLASSES = {
    f"urm-{access}": [stage for stage in STAGES if STAGES[stage].access == access] for access in get_args(Access)
}
CLASSES["urm-training"] += ["reference", "variant", "summary"]  # of ablation_study
# Who may name a secret of credentials: the accounts of the recall pods, and for each class of stages its own account.
READERS = {"urm-credentials": {"recall-api", "recall-worker"}} | {name: {name} for name in CLASSES}
READERS["urm-data"] |= {"urm-spark"}  # of the same stages, where they start executors
# What the manifests name and others make: the one list of it.
EXTERNAL = {
    "Secret": {*READERS, "recall-tokens", "redis-users", "urm-keda-redis"},
    "PersistentVolumeClaim": {"urm-releases"},
    "ClusterSecretStore": {"urm"},
    "Gateway": {"public"},
}
STARTED_BY_AIRFLOW = {"app.kubernetes.io/managed-by": "airflow"}
# Pods of others or started by Airflow, by the labels that a policy names, with their ports.
EXTERNAL_PODS: list[tuple[dict[str, str], set[int]]] = [
    ({"app.kubernetes.io/component": "redis"}, {6379}),
    ({"app.kubernetes.io/component": "mlflow"}, {5000}),
    ({"app.kubernetes.io/component": "recall-backfill"}, {9101}),
    ({"k8s-app": "kube-dns"}, {53}),
    ({"app.kubernetes.io/component": "spark-executor"}, set()),
    *(({"app.kubernetes.io/component": task, **STARTED_BY_AIRFLOW}, set()) for task in chain(*CLASSES.values())),
]
EXTERNAL_PORTS = {443, 6443, 6379}  # by address: the object store, the Kubernetes API, a Redis elsewhere
RELEASE_VARIABLES = {
    "URM_RELEASE": "metadata.annotations['urm.release/name']",
    "URM_RELEASE_BUNDLE": "metadata.annotations['urm.release/bundle']",
    "URM_RELEASE_MANIFEST": "metadata.annotations['urm.release/manifest']",
    "URM_RELEASE_ORDER": "metadata.annotations['urm.release/order']",
}
WORKERS = ("recall-worker", "recall-adhoc")
READY_PATHS = {"Deployment/recall-api": "/readyz/intake"} | {f"Deployment/{name}": "/readyz" for name in WORKERS}
LONGEST_ANSWER_SECONDS = next(
    limit.le for limit in RecallConfig.model_fields["ad_hoc_deadline_seconds"].metadata if hasattr(limit, "le")
)
PROMOTION_RULES = [
    {
        "apiGroups": ["apps"],
        "resources": ["deployments"],
        "resourceNames": list(WORKERS),
        "verbs": ["get", "list", "watch", "patch"],
    },
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    {
        "apiGroups": ["coordination.k8s.io"],
        "resources": ["leases"],
        "resourceNames": ["urm-promotion"],
        "verbs": ["get", "update"],
    },
]
_WORK = ["create", "get", "list", "patch", "delete"]
AIRFLOW_RULES = [  # what the operators and triggers of dags/common and dags/trainjob call
    {"apiGroups": [""], "resources": ["pods"], "verbs": _WORK},
    {"apiGroups": [""], "resources": ["pods/log"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["list"]},
    {"apiGroups": ["trainer.kubeflow.org"], "resources": ["trainjobs"], "verbs": _WORK},
    {"apiGroups": ["batch"], "resources": ["jobs"], "verbs": ["create", "get", "delete"]},
]
SPARK_RULES = [  # what Spark's driver calls for executors in client mode
    {
        "apiGroups": [""],
        "resources": ["pods", "configmaps"],
        "verbs": ["create", "get", "list", "watch", "patch", "delete", "deletecollection"],
    },
    {
        "apiGroups": [""],
        "resources": ["services", "persistentvolumeclaims"],
        "verbs": ["list", "delete", "deletecollection"],
    },
]
RIGHTS = {"urm-promotion": PROMOTION_RULES, "urm-airflow": AIRFLOW_RULES, "urm-spark": SPARK_RULES}
OF_COMPONENTS = {"urm-airflow", "urm-spark"}


def objects_are_labelled(objects: list[Object]) -> Iterator[str]:
    """Recommended labels; one namespace, which enforces the restricted profile."""
    for one in objects:
        metadata = one["metadata"]
        if metadata.get("labels", {}).get("app.kubernetes.io/name") != "urm":
            yield f"{one['kind']}/{metadata['name']} has no label app.kubernetes.io/name=urm"
        if metadata["name" if one["kind"] == "Namespace" else "namespace"] != "urm":
            yield f"{one['kind']}/{metadata['name']} is not in the namespace urm"
    for one in of_kind(objects, "Namespace"):
        if one["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield "the namespace does not enforce the restricted profile"


def pods_are_hardened(objects: list[Object]) -> Iterator[str]:
    """No root, no system call beyond the usual, nothing of the host, no token."""
    for name, _, spec in pod_specs(objects):
        context = spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{name} may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{name} has no seccomp profile"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name} has a token of the Kubernetes API"
        if spec.get("enableServiceLinks") is not False:
            yield f"{name} gets variables of every service"
        yield from (f"{name} uses {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key))


def volumes_are_bounded(objects: list[Object]) -> Iterator[str]:
    """No path of the node; an empty directory has a limit."""
    for name, _, spec in pod_specs(objects):
        for volume in spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"{name} mounts a path of the node"
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                yield f"{name}: volume {volume['name']} has no limit"


def containers_are_hardened(objects: list[Object]) -> Iterator[str]:
    """No privileges to gain, no writable image, no capabilities."""
    for name, _, spec in pod_specs(objects):
        for one in containers_of(spec):
            own = one.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("privileged"):
                yield f"{name}: {one['name']} may gain privileges"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{name}: {one['name']} may write into its image"
            if own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{name}: {one['name']} has capabilities"


def containers_are_limited_and_named(objects: list[Object]) -> Iterator[str]:
    """Requests and limits, a tag that stays, a termination message that tells why."""
    for name, _, spec in pod_specs(objects):
        for one in containers_of(spec):
            resources = one.get("resources", {})
            for part in ("requests", "limits"):
                missing = {"cpu", "memory"} - resources.get(part, {}).keys()
                yield from (f"{name}: {one['name']} has no {part} of {resource}" for resource in sorted(missing))
            tag = re.search(r":([\w.-]+)$|@sha256:[0-9a-f]{64}$", one["image"])
            if not tag or tag[1] == "latest":
                yield f"{name}: image {one['image']} has no fixed tag"
            if one.get("terminationMessagePolicy") != "FallbackToLogsOnError":
                yield f"{name}: {one['name']} does not tell why it ended"


def containers_are_probed(objects: list[Object]) -> Iterator[str]:
    """Startup, readiness and liveness at a port of the container; a worker is ready by its release, the API without."""
    for name, _, spec in pod_specs(objects):
        for one in spec["containers"]:
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                if probe not in one:
                    yield f"{name}: {one['name']} has no {probe}"
        ready = spec["containers"][0].get("readinessProbe", {}).get("httpGet", {}).get("path")
        if ready != READY_PATHS.get(name):
            yield f"{name} is ready by {ready}, expected {READY_PATHS.get(name)}"


def rollouts_lose_nothing(objects: list[Object]) -> Iterator[str]:
    """A new pod before an old one goes, a deadline, a budget, time to end; an autoscaler alone sets its replicas."""
    scaled = {
        one["spec"]["scaleTargetRef"]["name"] for one in of_kind(objects, "HorizontalPodAutoscaler", "ScaledObject")
    }
    yield from (f"autoscaler of {name}: no such Deployment" for name in scaled - names_of(objects, "Deployment"))
    budgets = of_kind(objects, "PodDisruptionBudget")
    for one in of_kind(objects, "Deployment"):
        name, spec, pod = one["metadata"]["name"], one["spec"], one["spec"]["template"]["spec"]
        if spec.get("strategy", {}).get("rollingUpdate") != {"maxUnavailable": 0, "maxSurge": 1}:
            yield f"{name} takes a pod away before another is ready"
        if "progressDeadlineSeconds" not in spec:
            yield f"{name} has no deadline for a rollout"
        if ("replicas" in spec) is (name in scaled):
            yield f"{name} has replicas and an autoscaler, or neither"
        labels = spec["template"]["metadata"]["labels"]
        if sum(is_selected(labels, budget["spec"]["selector"]) for budget in budgets) != 1:
            yield f"{name} has no disruption budget of its own"
        if not any(is_selected(labels, spread["labelSelector"]) for spread in pod.get("topologySpreadConstraints", [])):
            yield f"{name} is not spread over nodes"
        sleep = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        needed = 2 * GRACE_SECONDS if name in WORKERS else sleep + LONGEST_ANSWER_SECONDS
        if (name == "recall-api") is not (sleep > 0):
            yield f"{name} waits {sleep} s for endpoints to drain"
        if pod.get("terminationGracePeriodSeconds", 30) <= needed:
            yield f"{name} is killed before it has drained, expected more than {needed} s"


def selectors_choose_pods(objects: list[Object]) -> Iterator[str]:
    """Every selector chooses pods: each Deployment its own and no other's, and none by a version."""
    pods = [(name, metadata["labels"]) for name, metadata, _ in pod_specs(objects)]
    known = [labels for _, labels in pods] + [labels for labels, _ in EXTERNAL_PODS]
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        for place, selector in _selectors(one):
            if "app.kubernetes.io/version" in str(selector):
                yield f"{name} selects by a version"
            if not any(is_selected(labels, selector) for labels in known):
                yield f"{name}: {place} selects nothing"
            if one["kind"] in ("Deployment", "StatefulSet") and place == "selector":
                chosen = [pod for pod, labels in pods if is_selected(labels, selector)]
                if chosen != [name]:
                    yield f"{name} selects pods of {chosen}"


def _selectors(one: Object) -> Iterator[tuple[str, Object]]:
    """Selectors of pods in an object, with their place."""
    spec = one.get("spec", {})
    if one["kind"] == "Service":
        yield "selector", {"matchLabels": spec["selector"]}
    elif "selector" in spec:
        yield "selector", spec["selector"]
    if one["kind"] == "NetworkPolicy":
        yield "podSelector", spec["podSelector"]
        for way, peers in (("ingress", "from"), ("egress", "to")):
            for number, rule in enumerate(spec.get(way, [])):
                for peer in rule[peers]:
                    if "podSelector" in peer:
                        yield f"{way} {number}", peer["podSelector"]


def references_exist(objects: list[Object]) -> Iterator[str]:
    """What an object names is there, or is declared external."""
    for source, kind, target in find_references(objects):
        if target not in names_of(objects, kind) | EXTERNAL.get(kind, set()):
            yield f"{source} names {kind} {target}, which nobody makes"


def find_references(objects: list[Object]) -> Iterator[tuple[str, str, str]]:
    """Who names what of which kind."""
    for name, _, spec in pod_specs(objects):
        yield from ((name, kind, target) for kind, target in _named_by_pod(spec))
        for one in containers_of(spec):
            mounted = {mount["name"] for mount in one.get("volumeMounts", [])}
            yield from ((name, f"volume of {name}", volume) for volume in mounted - _volumes(spec))
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        yield from ((name, kind, target) for kind, target in _named_by_object(one, one.get("spec", {})))


def _named_by_pod(spec: Object) -> Iterator[tuple[str, str]]:
    if "serviceAccountName" in spec:
        yield "ServiceAccount", spec["serviceAccountName"]
    sources = [source for one in containers_of(spec) for source in one.get("envFrom", [])]
    values = [each["valueFrom"] for one in containers_of(spec) for each in one.get("env", []) if "valueFrom" in each]
    for holder, key, field, kind in (
        (sources, "configMapRef", "name", "ConfigMap"),
        (sources, "secretRef", "name", "Secret"),
        (values, "secretKeyRef", "name", "Secret"),
        (spec.get("volumes", []), "configMap", "name", "ConfigMap"),
        (spec.get("volumes", []), "secret", "secretName", "Secret"),
        (spec.get("volumes", []), "persistentVolumeClaim", "claimName", "PersistentVolumeClaim"),
    ):
        yield from ((kind, each[key][field]) for each in holder if key in each)


def _named_by_object(one: Object, spec: Object) -> Iterator[tuple[str, str]]:
    if one["kind"] == "RoleBinding":
        yield from ((each["kind"], each["name"]) for each in (one["roleRef"], *one["subjects"]))
    elif one["kind"] == "StatefulSet":
        yield "Service", spec["serviceName"]
    elif one["kind"] == "ScaledObject":
        yield from (("TriggerAuthentication", each["authenticationRef"]["name"]) for each in spec["triggers"])
    elif one["kind"] == "TriggerAuthentication":
        yield from (("Secret", each["name"]) for each in spec["secretTargetRef"])
    elif one["kind"] == "ExternalSecret":
        yield spec["secretStoreRef"]["kind"], spec["secretStoreRef"]["name"]
        yield "Secret", spec["target"]["name"]
    elif one["kind"] == "HTTPRoute":
        yield from (("Gateway", parent["name"]) for parent in spec["parentRefs"])
        yield from (("Service", each["name"]) for rule in spec["rules"] for each in rule["backendRefs"])


def _volumes(spec: Object) -> set[str]:
    return {volume["name"] for volume in spec.get("volumes", [])}


def commands_listen_where_declared(objects: list[Object]) -> Iterator[str]:
    """Probes ask a port of their container; a command of ours opens exactly those that are declared."""
    for name, _, spec in pod_specs(objects):
        for one in spec["containers"]:
            own = {port["name"] for port in one.get("ports", [])}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                handler = one.get(probe, {})
                port = (handler.get("httpGet") or handler.get("tcpSocket") or {}).get("port")
                if port is not None and port not in own:
                    yield f"{name}: {probe} asks port {port}"
            if one.get("command") == ["urm"] and _listens(one["args"]) != set(ports_of(spec).values()):
                yield f"{name}: {one['name']} listens on {sorted(_listens(one['args']))}, declared are other ports"


def ports_are_served(objects: list[Object]) -> Iterator[str]:
    """Every port of a service, route or policy is one of a pod; Prometheus reads all but those of requests."""
    pods = [(metadata["labels"], ports_of(spec)) for _, metadata, spec in pod_specs(objects)]

    def served(selector: Object) -> dict[str, int]:
        return {name: port for labels, ports in pods if is_selected(labels, selector) for name, port in ports.items()}

    services = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "Service")}
    for name, service in services.items():
        targets = [port["targetPort"] for port in service["ports"]]
        missing = [port for port in targets if port not in served({"matchLabels": service["selector"]})]
        yield from (f"Service/{name} leads to port {port}" for port in missing)
    for one in of_kind(objects, "HTTPRoute"):
        for backend in (each for rule in one["spec"]["rules"] for each in rule["backendRefs"]):
            if backend["port"] not in [port["port"] for port in services.get(backend["name"], {}).get("ports", [])]:
                yield f"HTTPRoute/{one['metadata']['name']} leads to port {backend['port']}"
    for one in of_kind(objects, "PodMonitor"):
        there = set(served(one["spec"]["selector"]))
        wanted = [each["relabelings"][0]["regex"] for each in one["spec"]["podMetricsEndpoints"]]
        scraped = {port for port in there if any(re.fullmatch(regex, port) for regex in wanted)}
        if scraped != there - {"http"}:
            yield f"PodMonitor/{one['metadata']['name']} scrapes {sorted(scraped)} of {sorted(there)}"
    for one in of_kind(objects, "NetworkPolicy"):
        yield from _judge_policy_ports(one, [(labels, set(ports.values())) for labels, ports in pods] + EXTERNAL_PODS)


def _judge_policy_ports(policy: Object, pods: list[tuple[dict[str, str], set[int]]]) -> Iterator[str]:
    spec = policy["spec"]

    def served(selector: Object) -> set[int]:
        return set().union(*(ports for labels, ports in pods if is_selected(labels, selector)))

    for way, peers in (("ingress", "from"), ("egress", "to")):
        for rule in spec.get(way, []):
            if way == "ingress":
                known = served(spec["podSelector"])
            else:
                known = set().union(
                    *(served(peer["podSelector"]) if "podSelector" in peer else EXTERNAL_PORTS for peer in rule[peers])
                )
            for port in rule.get("ports", ()):
                if known.isdisjoint(range(port["port"], port.get("endPort", port["port"]) + 1)):
                    yield f"NetworkPolicy/{policy['metadata']['name']} opens port {port['port']}, where nobody listens"


def edges_are_open_at_both_ends(objects: list[Object]) -> Iterator[str]:
    """Where a policy lets pods out to others of the namespace, these let them in at that port."""
    pods = [metadata["labels"] for _, metadata, _ in pod_specs(objects)] + [labels for labels, _ in EXTERNAL_PODS]
    specs = {one["metadata"]["name"]: one["spec"] for one in of_kind(objects, "NetworkPolicy")}
    for name, spec in specs.items():
        for rule in spec.get("egress", []):
            peers = [peer["podSelector"] for peer in rule["to"] if peer.keys() == {"podSelector"}]
            ends = product(
                [labels for labels in pods if is_selected(labels, spec["podSelector"])],
                [labels for labels in pods if any(is_selected(labels, peer) for peer in peers)],
                [port["port"] for port in rule.get("ports", [])] or [None],
            )
            for source, target, port in ends:
                if not _lets_in(specs.values(), source, target, port):
                    out, to = (labels["app.kubernetes.io/component"] for labels in (source, target))
                    at = "every port" if port is None else f"port {port}"
                    yield f"NetworkPolicy/{name} lets {out} out to {to}, which does not let it in at {at}"


def _lets_in(specs: Iterable[Object], source: dict[str, str], target: dict[str, str], port: int | None) -> bool:
    """Whether policies let a pod in at a port, or at every port; without any for the target, nothing is denied."""
    guards = [spec for spec in specs if "Ingress" in spec["policyTypes"] and is_selected(target, spec["podSelector"])]
    rules = [rule for spec in guards for rule in spec.get("ingress", [])]
    opened = [rule for rule in rules if "ports" not in rule or port in [each["port"] for each in rule["ports"]]]
    peers = [peer["podSelector"] for rule in opened for peer in rule["from"] if peer.keys() == {"podSelector"}]
    return not guards or any(is_selected(source, peer) for peer in peers)


def _listens(arguments: list[str]) -> set[int]:
    """Ports that a command of ours opens."""
    given = dict(pairwise(arguments))
    ports = {int(given[option]) for option in ("--port", "--metrics-port") if option in given}
    instances = int(given.get("--instances", 0)) + int(given.get("--ad-hoc", 0))
    return ports | {int(given["--port"]) + 1 + number for number in range(instances)}


def releases_come_from_promotion(objects: list[Object]) -> Iterator[str]:
    """No manifest names a release; worker pods read it from their annotations, in every container alike."""
    for one in objects:
        for metadata in (one["metadata"], one.get("spec", {}).get("template", {}).get("metadata", {})):
            for key in metadata.get("annotations", {}):
                if key.startswith("urm.release/") or key == "kubernetes.io/change-cause":
                    yield f"{one['kind']}/{one['metadata']['name']} has the annotation {key}"
        if one["kind"] == "Lease" and "spec" in one:
            yield f"Lease/{one['metadata']['name']} has a holder"
    for name, _, spec in pod_specs(of_kind(objects, "Deployment")):
        for one in containers_of(spec) if name.split("/")[1] in WORKERS else ():
            fields = {
                variable["name"]: variable["valueFrom"]["fieldRef"]["fieldPath"]
                for variable in one.get("env", [])
                if "valueFrom" in variable
            }
            if fields != RELEASE_VARIABLES:
                yield f"{name}: {one['name']} does not read its release from the annotations"
        if name.split("/")[1] in WORKERS and [one["name"] for one in spec.get("initContainers", [])] != ["fetch"]:
            yield f"{name} does not verify its release"


def only_who_needs_them_has_rights(objects: list[Object]) -> Iterator[str]:
    """A role each with exactly their rights, for the account of the same name; some come with a component."""
    roles = {one["metadata"]["name"]: one for one in of_kind(objects, "Role", "ClusterRole")}
    if roles.keys() | OF_COMPONENTS != RIGHTS.keys():
        yield f"there are roles {sorted(roles)}"
    for name, one in roles.items():
        if (one["kind"], one["rules"]) != ("Role", RIGHTS.get(name)):
            yield f"{one['kind']}/{name} allows other than it should"
    bindings = [
        (one["kind"], one["roleRef"]["name"], [subject["name"] for subject in one["subjects"]])
        for one in of_kind(objects, "RoleBinding", "ClusterRoleBinding")
    ]
    if sorted(bindings) != sorted(("RoleBinding", name, [name]) for name in roles):
        yield f"rights are bound as {bindings}"
    for one in of_kind(objects, "ServiceAccount"):
        if one.get("automountServiceAccountToken") is not False:
            yield f"ServiceAccount/{one['metadata']['name']} hands out its token"


def credentials_go_to_their_class(objects: list[Object]) -> Iterator[str]:
    """A secret of credentials is named by pods of its own account, and a pod of that account names no other."""
    for name, _, spec in pod_specs(objects):
        account = spec.get("serviceAccountName", "default")
        for secret in {target for kind, target in _named_by_pod(spec) if kind == "Secret"} & READERS.keys():
            if account not in READERS[secret]:
                yield f"{name} with the account {account} gets the secret {secret}"


def commands_exist(objects: list[Object]) -> Iterator[str]:
    """Every `urm` command of a container is parsed as the program would parse it."""
    for name, _, spec in pod_specs(objects):
        for one in containers_of(spec):
            if one.get("command") != ["urm"]:
                continue
            command, words = typer.main.get_command(app), list(one["args"])
            try:
                while hasattr(command, "commands"):
                    command = command.commands[words.pop(0)]
                command.make_context(command.name, words)
            except (_UsageError, LookupError) as error:
                yield f"{name}: urm {shlex.join(one['args'])}: {error}"


def settings_are_read(objects: list[Object]) -> Iterator[str]:
    """Every variable of ours is a setting, with a value that fits; its files lie on a volume."""
    for one in of_kind(objects, "ConfigMap"):
        if one["metadata"]["name"] == "urm-settings":
            yield from _judge_settings("ConfigMap/urm-settings", one["data"])
    for name, _, spec in pod_specs(objects):
        for one in containers_of(spec):
            values = {variable["name"]: variable.get("value", "") for variable in one.get("env", [])}
            mounts = {mount["mountPath"] for mount in one.get("volumeMounts", [])}
            for variable in ("HOME", "SPARK_CONF_DIR", "URM_CACHE_DIR", "URM_API_TOKENS_FILE"):
                if variable in values and mounts.isdisjoint([values[variable], str(Path(values[variable]).parent)]):
                    yield f"{name}: {one['name']}: {variable}={values[variable]} lies on no volume"
            own = {variable: value for variable, value in values.items() if variable not in ("HOME", "SPARK_CONF_DIR")}
            yield from _judge_settings(f"{name}: {one['name']}", own)


def _judge_settings(place: str, values: dict[str, str]) -> Iterator[str]:
    fields = {name.removeprefix("URM_").lower(): value for name, value in values.items()}
    unknown = sorted(fields.keys() - Settings.model_fields.keys())
    yield from (f"{place}: URM_{name.upper()} is no setting" for name in unknown)
    try:
        Settings(**{name: value for name, value in fields.items() if name not in unknown and value})
    except ValidationError as error:
        yield from (f"{place}: {fault['loc'][0]}: {fault['msg']}" for fault in error.errors())


POLICIES: tuple[Policy, ...] = (
    objects_are_labelled,
    pods_are_hardened,
    volumes_are_bounded,
    containers_are_hardened,
    containers_are_limited_and_named,
    containers_are_probed,
    rollouts_lose_nothing,
    selectors_choose_pods,
    references_exist,
    commands_listen_where_declared,
    ports_are_served,
    edges_are_open_at_both_ends,
    releases_come_from_promotion,
    only_who_needs_them_has_rights,
    credentials_go_to_their_class,
    commands_exist,
    settings_are_read,
)


def find_faults(objects: Iterable[Object]) -> list[str]:
    """Faults by every policy."""
    every = list(objects)
    return [fault for policy in POLICIES for fault in policy(every)]
