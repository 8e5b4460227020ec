"""Manifests as kustomize renders them, and a way to find objects in them."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.worlds import REPOSITORY

K8S = REPOSITORY / "k8s"
COMPONENTS = tuple(sorted(path.name for path in (K8S / "components").iterdir()))
OVERLAYS = tuple(sorted(path.name for path in (K8S / "overlays").iterdir()))
BASES = {"base": K8S / "base", **{name: K8S / "overlays" / name for name in OVERLAYS}}
Object = dict[str, Any]
needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not on PATH; Debian's package `kubernetes-client` has it"
)


def read_components(base: str) -> set[str]:
    """Components that a base or an overlay has already."""
    kustomization = yaml.safe_load((BASES[base] / "kustomization.yaml").read_text())
    return {Path(path).name for path in kustomization.get("components", [])}


# The base and every overlay as they are, and every overlay with each component that it does not have yet.
RENDERS = [(base, "") for base in BASES]
RENDERS += [(base, name) for base in OVERLAYS for name in COMPONENTS if name not in read_components(base)]


@cache
def render_text(base: str, *added: str) -> str:
    """YAML of a base or overlay with components added."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            os.path.relpath(path, folder) for path in (BASES[base], *(K8S / "components" / name for name in added))
        ]
        kustomization = {"resources": paths[:1], "components": paths[1:]}
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # deprecated fields and the like
    return done.stdout


def render(base: str, *added: str) -> list[Object]:
    """The objects; the caller may change them."""
    return list(yaml.load_all(render_text(base, *added), Loader=yaml.CSafeLoader))


def of_kind(objects: Iterable[Object], *kinds: str) -> list[Object]:
    """Objects of some kinds."""
    return [one for one in objects if one["kind"] in kinds]


def names_of(objects: Iterable[Object], kind: str) -> set[str]:
    """Names of the objects of a kind."""
    return {one["metadata"]["name"] for one in of_kind(objects, kind)}


def pod_specs(objects: Iterable[Object]) -> Iterator[tuple[str, Object, Object]]:
    """Name, metadata and specification of every pod that the objects make; a pod is one itself."""
    for one in objects:
        name = f"{one['kind']}/{one['metadata']['name']}"
        if one["kind"] == "Pod":
            yield name, one["metadata"], one["spec"]
        elif "containers" in one.get("spec", {}).get("template", {}).get("spec", {}):
            template = one["spec"]["template"]
            claims = [{"name": each["metadata"]["name"]} for each in one["spec"].get("volumeClaimTemplates", [])]
            yield name, template["metadata"], {**template["spec"], "volumes": [*template["spec"]["volumes"], *claims]}


def containers_of(spec: Object) -> list[Object]:
    """Containers of a pod, those that start it among them."""
    return [*spec.get("initContainers", []), *spec["containers"]]


def ports_of(spec: Object) -> dict[str, int]:
    """Ports of a pod by name."""
    return {port["name"]: port["containerPort"] for one in spec["containers"] for port in one.get("ports", [])}


def is_selected(labels: dict[str, str], selector: Object) -> bool:
    """Whether a selector chooses labels; `In` is the only operator that the manifests use."""
    wanted = [(key, [value]) for key, value in selector.get("matchLabels", {}).items()]
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In"
        wanted.append((expression["key"], expression["values"]))
    return all(labels.get(key) in values for key, values in wanted)
