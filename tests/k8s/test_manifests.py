"""Form of the manifests, and the names in them that must agree."""

import re

import kubernetes_validate
import pytest
import yaml

from components.addresses import open_store
from components.features.checks import require_embedded
from components.settings import Settings
from tests.worlds import REPOSITORY

K8S = REPOSITORY / "k8s"
MANIFESTS = sorted(path for path in K8S.rglob("*.yaml") if path.name != "kustomization.yaml")
KUSTOMIZATION = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())
DOCKERFILE = (K8S / "images" / "Dockerfile").read_text()
POD = yaml.safe_load((K8S / "jobs" / "stage-pod.yaml").read_text())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_is_valid(path):
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.33", strict=True)
        assert document["metadata"]["labels"]["app.kubernetes.io/name"] == "urm"


def test_kustomization_names_every_file_of_the_base():
    named = {*KUSTOMIZATION["resources"], *KUSTOMIZATION["configMapGenerator"][0]["envs"]}
    assert named == {path.name for path in (K8S / "base").iterdir()} - {"kustomization.yaml"}


def test_the_pod_finds_its_settings_and_account():
    container = POD["spec"]["containers"][0]
    assert container["envFrom"][0]["configMapRef"]["name"] == KUSTOMIZATION["configMapGenerator"][0]["name"]
    account = yaml.safe_load((K8S / "base" / "service-account.yaml").read_text())
    assert POD["spec"]["serviceAccountName"] == account["metadata"]["name"]


def test_settings_are_ones_that_the_code_reads():
    names = [line.split("=")[0] for line in (K8S / "base" / "settings.env").read_text().split()]
    unknown = [name for name in names if name.removeprefix("URM_").lower() not in Settings.model_fields]
    assert unknown == []


def test_stages_can_run_with_these_settings(monkeypatch):
    for line in (K8S / "base" / "settings.env").read_text().split():
        monkeypatch.setenv(*line.split("=", 1))
    settings = Settings()
    require_embedded(settings)
    open_store(settings.runs_uri)  # the image has the driver: it installs what this environment has


def test_the_image_has_the_extra_of_its_store():
    assert "'.[train,serve,s3]'" in DOCKERFILE


def test_no_secret_is_kept_in_the_repository():
    for path in MANIFESTS:
        assert all(document["kind"] != "Secret" for document in yaml.safe_load_all(path.read_text()))


def test_image_and_pod_agree_on_the_user():
    user = re.search(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)
    assert int(user.group(1)) == POD["spec"]["securityContext"]["runAsUser"]


def test_image_copies_what_exists():
    repository = K8S.parent
    for line in DOCKERFILE.splitlines():
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (repository / source).exists(), source
