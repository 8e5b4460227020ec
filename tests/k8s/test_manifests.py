"""Form of the manifests: kustomize builds them, schemas of Kubernetes and of the operators accept them."""

import json
import re
from functools import cache
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from components.addresses import open_store
from components.flow import STAGES
from components.settings import Settings
from tests.k8s import policies
from tests.k8s.rendering import COMPONENTS, K8S, RENDERS, Object, needs_kubectl, of_kind, render
from tests.worlds import REPOSITORY

KUBERNETES = ("1.32", "1.35", "1.37")  # the oldest that is supported, the newest, and one between
POD, BACKFILL = (yaml.safe_load((K8S / "jobs" / name).read_text()) for name in ("stage-pod.yaml", "backfill.yaml"))
DURATION = r"^([0-9]{1,5}(h|m|s|ms)){1,4}$"


class _Documented(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Metadata(_Documented):
    name: str
    namespace: str
    labels: dict[str, str]


class _Parent(_Documented):
    name: str
    namespace: str


class _Path(_Documented):
    type: Literal["Exact", "PathPrefix", "RegularExpression"]
    value: str = Field(pattern="^/")


class _Match(_Documented):
    path: _Path


class _Backend(_Documented):
    name: str
    port: int = Field(ge=1, le=65535)


class _Timeouts(_Documented):
    request: str = Field(pattern=DURATION)


class _Rule(_Documented):
    matches: list[_Match] = Field(max_length=64)
    timeouts: _Timeouts
    backendRefs: list[_Backend] = Field(min_length=1, max_length=16)


class _RouteSpec(_Documented):
    parentRefs: list[_Parent] = Field(min_length=1, max_length=32)
    hostnames: list[str] = Field(max_length=16)
    rules: list[_Rule] = Field(min_length=1, max_length=16)


class HttpRoute(_Documented):
    """Fields of Gateway API's HTTPRoute that we use."""

    apiVersion: Literal["gateway.networking.k8s.io/v1"]
    kind: Literal["HTTPRoute"]
    metadata: _Metadata
    spec: _RouteSpec


class _Store(_Documented):
    kind: Literal["SecretStore", "ClusterSecretStore"]
    name: str


class _Target(_Documented):
    name: str
    creationPolicy: Literal["Owner", "Orphan", "Merge", "None"]


class _Extract(_Documented):
    key: str


class _Source(_Documented):
    extract: _Extract


class _SecretSpec(_Documented):
    refreshInterval: str = Field(pattern=r"^(\d+(h|m|s))+$")
    secretStoreRef: _Store
    target: _Target
    dataFrom: list[_Source] = Field(min_length=1)


class ExternalSecret(_Documented):
    """Fields of External Secrets' ExternalSecret that we use."""

    apiVersion: Literal["external-secrets.io/v1"]
    kind: Literal["ExternalSecret"]
    metadata: _Metadata
    spec: _SecretSpec


CUSTOM = (
    "ScaledObject",
    "TriggerAuthentication",
    "PodMonitor",
    "PrometheusRule",
    "HTTPRoute",
    "ExternalSecret",
    "TrainingRuntime",
)


@cache
def custom_models() -> dict[str, type[BaseModel]]:
    """Models of the operators' objects by kind: published ones, and ours where none are."""
    # Ten seconds to import, which every process of the tests would take at its start.
    from cloudcoil.models.keda import v1alpha1 as keda
    from cloudcoil.models.prometheus_operator import v1 as prometheus
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime as TrainingRuntime

    models = (
        keda.ScaledObject,
        keda.TriggerAuthentication,
        prometheus.PodMonitor,
        prometheus.PrometheusRule,
        HttpRoute,
        ExternalSecret,
        TrainingRuntime,
    )
    return dict(zip(CUSTOM, models, strict=True))


@cache
def every_object() -> tuple[Object, ...]:
    """All different objects of all bases, overlays and components."""
    objects = [one for base, added in RENDERS for one in render(base, *filter(None, [added]))]
    return tuple({json.dumps(one, sort_keys=True): one for one in objects}.values())


def is_documented(one: Object) -> bool:
    """Whether the model of an operator's object accepts it and knows all its fields."""
    model = custom_models()[one["kind"]]
    try:
        return model.model_validate(one).model_dump(by_alias=True, exclude_unset=True, mode="json") == one
    except ValueError:
        return False


@needs_kubectl
@pytest.mark.parametrize("version", KUBERNETES)
def test_objects_are_valid_kubernetes(version: str) -> None:
    for one in every_object():
        if one["kind"] not in CUSTOM:
            kubernetes_validate.validate(one, version, strict=True)


@needs_kubectl
@pytest.mark.parametrize("kind", CUSTOM)
def test_objects_of_operators_are_valid(kind: str) -> None:
    objects = of_kind(every_object(), kind)
    assert objects
    for one in objects:
        assert is_documented(one)
        assert not is_documented({**one, "spec": {**one["spec"], "nonsense": 1}})
        first = next(iter(one["spec"]))
        assert not is_documented({**one, "spec": {**one["spec"], first: 0.5}})


@needs_kubectl
@pytest.mark.parametrize("base", ["base", "local", "production"])
def test_stages_can_run_with_these_settings(base: str) -> None:
    [settings] = [
        one["data"] for one in of_kind(render(base), "ConfigMap") if one["metadata"]["name"] == "urm-settings"
    ]
    read = Settings(**{name.removeprefix("URM_").lower(): value for name, value in settings.items()})
    open_store(read.runs_uri)  # the image has the driver: it installs what this environment has
    assert read.deploy_to == "kubernetes"


@pytest.mark.parametrize("path", sorted(K8S.glob("*/*/kustomization.yaml")), ids=lambda path: path.parent.name)
def test_kustomization_names_every_file_beside_it(path: Any) -> None:
    content = yaml.safe_load(path.read_text())
    generated = content.get("configMapGenerator", [])
    named = {name for one in generated for name in (*one.get("envs", []), *one.get("files", []))}
    named |= {name for name in content.get("resources", []) if not name.startswith("..")}
    assert named == {file.name for file in path.parent.iterdir()} - {"kustomization.yaml", "README.md"}


def test_every_component_is_described_in_three_lines_and_on_the_map() -> None:
    text = (K8S / "README.md").read_text()
    for name in COMPONENTS:
        assert len((K8S / "components" / name / "README.md").read_text().splitlines()) == 3
        assert f"`components/{name}/`" in text


def test_no_secret_is_kept_in_the_repository() -> None:
    for path in K8S.rglob("*.yaml"):
        assert all(one.get("kind") != "Secret" for one in yaml.safe_load_all(path.read_text()) if isinstance(one, dict))


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_pod_of_a_stage_is_valid(version: str) -> None:
    kubernetes_validate.validate(POD, version, strict=True)


@needs_kubectl
def test_the_job_of_the_backfill_keeps_the_policies() -> None:
    """It runs to its end and serves nobody, so that it needs no probe; the cluster fills in the number of a pod."""
    job = json.loads(json.dumps(BACKFILL).replace("$(JOB_COMPLETION_INDEX)", "1"))
    job["metadata"]["namespace"] = "urm"
    faults = [fault for fault in policies.find_faults([*render("base"), job]) if "Job/" in fault]
    assert [fault for fault in faults if "Probe" not in fault] == []


@pytest.mark.parametrize("version", KUBERNETES)
def test_the_job_of_the_backfill_is_valid(version: str) -> None:
    kubernetes_validate.validate(BACKFILL, version, strict=True)


@needs_kubectl
def test_executors_are_pods_that_keep_the_policies() -> None:
    """As Spark completes their template; they serve nobody, so that they need no probe."""
    objects = render("production", "spark", "cache")
    [content] = [one["data"] for one in of_kind(objects, "ConfigMap") if one["metadata"]["name"] == "urm-spark"]
    pod = yaml.safe_load(content["executor.yaml"])
    size = {"cpu": "4", "memory": "13Gi"}
    pod["metadata"] |= {"name": "executor", "namespace": "urm"}
    pod["spec"]["containers"][0]["resources"] = {"requests": size, "limits": size}
    for version in KUBERNETES:
        kubernetes_validate.validate(pod, version, strict=True)
    faults = [fault for fault in policies.find_faults([*objects, pod]) if "Pod/executor" in fault]
    assert [fault for fault in faults if "Probe" not in fault] == []


def read_spark_defaults() -> dict[str, str]:
    text = (K8S / "components" / "spark" / "spark-defaults.conf").read_text()
    return dict(line.split() for line in text.splitlines() if line[:1] != "#")


def test_the_heap_of_a_driver_is_half_of_the_smallest_pod_that_is_one() -> None:
    """Python takes what the heap leaves; without a value, Spark's default would be a gibibyte."""
    pods = [int(stage.resources.memory.removesuffix("Gi")) for stage in STAGES.values() if stage.spark]
    assert int(read_spark_defaults()["spark.driver.memory"].removesuffix("g")) == min(pods) // 2


def test_executors_have_the_version_and_the_paths_of_their_drivers() -> None:
    folder = K8S / "components" / "spark"
    pod = yaml.safe_load((folder / "executor.yaml").read_text())["spec"]
    values = read_spark_defaults()
    version = re.search(r"^pyspark==(.*)$", (REPOSITORY / "constraints.txt").read_text(), re.MULTILINE)
    image = values["spark.kubernetes.container.image"]
    assert image == pod["containers"][0]["image"]
    assert version is not None and image.startswith(f"apache/spark:{version[1]}-")
    assert values["spark.kubernetes.executor.podTemplateFile"] == "/etc/spark/executor.yaml"
    caches = {one["value"] for one in POD["spec"]["containers"][0]["env"] if one["name"] == "URM_CACHE_DIR"}
    assert caches < {one["mountPath"] for one in pod["containers"][0]["volumeMounts"]}
    assert pod["securityContext"] == POD["spec"]["securityContext"]
