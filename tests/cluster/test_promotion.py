"""Stand-ins without a cluster: tests/components/deploy, tests/components/recall/worker/test_fixed.py."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import yaml

from components.deploy.lease import NAME as LEASE
from tests.cluster.load import load
from tests.cluster.world import AD_HOC, API, WORKER, ClusterRelease, Service, build_release, pause_until
from tests.worlds import REPOSITORY


def history(service: Service, deployment: str = WORKER) -> str:
    return service.kubectl("rollout", "history", f"deployment/{deployment}")


def test_a_promotion_under_load_fails_no_read_and_shows_nothing_stale(service: Service) -> None:
    first, second = service.releases
    with load(service) as found:
        time.sleep(3)
        code, said = service.promote(second)
        time.sleep(3)
    assert code == 0, said
    service.require_agreement(second)
    assert service.alias("previous") == first.name
    print(found.outcomes, found.sent, found.releases)
    assert found.failed == {}
    assert found.went_back == []
    assert (found.refused, found.releases) == (0, [first.name, second.name])
    assert found.outcomes["model"] > 0
    assert f"promotion: {second.name}" in history(service)
    notes = service.kubectl.read("deployment", WORKER)["metadata"]["annotations"]
    assert json.loads(notes["urm.release/previous"])["release"] == first.name


def test_a_promotion_again_replaces_no_pod(service: Service) -> None:
    first = service.releases[0]
    before = {pod["metadata"]["name"] for pod in service.kubectl.pods(WORKER)}
    code, said = service.promote(first)
    assert code == 0, said
    assert {pod["metadata"]["name"] for pod in service.kubectl.pods(WORKER)} == before
    assert service.alias("previous") != first.name


def require_undone(service: Service, code: int, said: str, words: str) -> None:
    """Check that a promotion failed with a sentence, and that nothing has changed."""
    first = service.releases[0]
    assert code != 0
    assert words in " ".join(said.split())
    pause_until(lambda: service.annotation(WORKER) == service.annotation(AD_HOC) == first.name, 30)
    assert service.alias("champion") == first.name


def spoil_file(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(b"nonsense")


def test_a_file_that_was_altered_is_found_by_the_init_container(service: Service) -> None:
    second = build_release(service.settings, service.home, 2, name="altered")
    with fsspec.open(f"{second.bundle}/titles.parquet", "ab") as stream:
        stream.write(b"!")
    code, said = service.promote(second)
    require_undone(service, code, said, "titles.parquet: expected")
    service.require_agreement(service.releases[0])


def test_a_model_that_cannot_be_loaded_is_undone_with_its_sentence(service: Service) -> None:
    broken = build_release(service.settings, service.home, 3, spoil_file("model/urm.safetensors"), "broken")
    before = {pod["metadata"]["name"] for pod in service.kubectl.pods(WORKER) if pod}
    code, said = service.promote(broken)
    require_undone(service, code, said, "while deserializing header")
    service.require_agreement(service.releases[0])
    assert before <= {pod["metadata"]["name"] for pod in service.kubectl.pods(WORKER)}, "the old pods went on"


CONTAINER = "/spec/template/spec/containers/0"
# What somebody does to the template, and what the promotion says then.
OBSTACLES = {
    "never ready": (
        [{"op": "replace", "path": f"{CONTAINER}/readinessProbe/httpGet/path", "value": "/nowhere"}],
        "runs but is not ready",
    ),
    "out of memory": (
        [{"op": "replace", "path": f"{CONTAINER}/resources",
          "value": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "120Mi"}}}],
        "OOMKilled, limit 120Mi",
    ),
    "no node": (
        [{"op": "add", "path": "/spec/template/spec/nodeSelector", "value": {"no-such": "node"}}],
        "cannot be scheduled",
    ),
    "no image": (
        [{"op": "replace", "path": f"{CONTAINER}/image", "value": "urm-recall-worker:none"}],
        "image urm-recall-worker:none cannot be pulled",
    ),
}  # fmt: skip


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_rollout_that_gets_stuck_says_why_and_is_undone(service: Service, obstacle: str) -> None:
    patch, words = OBSTACLES[obstacle]
    kubectl, first, second = service.kubectl, *service.releases
    spec = kubectl.read("deployment", WORKER)["spec"]["template"]["spec"]
    kubectl("patch", "deployment", WORKER, "--type", "json", "--patch", json.dumps(patch))
    try:
        code, said = service.promote(second)
        require_undone(service, code, said, words)
        pause_until(lambda: service.serving() == first.name, 60)
        assert any(pod["metadata"]["annotations"]["urm.release/name"] == first.name for pod in kubectl.pods(WORKER))
    finally:
        restored = [{"op": "replace", "path": "/spec/template/spec", "value": spec}]
        kubectl("patch", "deployment", WORKER, "--type", "json", "--patch", json.dumps(restored))
    pause_until(service.settled, 120)


def holds_lease(service: Service) -> bool:
    return bool(service.kubectl.read("lease", LEASE).get("spec", {}).get("holderIdentity"))


# When a promotion is killed.
STEPS: dict[str, Callable[[Service, ClusterRelease], object]] = {
    "it holds the Lease": lambda service, _: holds_lease(service),
    "one template is changed": lambda service, release: service.annotation(WORKER) == release.name,
    "both are": lambda service, release: service.annotation(AD_HOC) == release.name,
    "the rollout is complete": lambda service, release: (
        service.annotation(AD_HOC) == release.name and service.settled()
    ),
    "it is champion": lambda service, release: service.alias("champion") == release.name,
}


@pytest.mark.parametrize("step", STEPS)
def test_a_promotion_killed_at_any_step_is_finished_by_the_next(service: Service, step: str) -> None:
    first, second = service.releases
    process = service.start("promote", "--config", "tiny", "--run-dir", second.run_dir, "--force")
    pause_until(lambda: STEPS[step](service, second) or process.poll() is not None, 150)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    code, said = service.promote(second)
    assert code == 0, said
    service.require_agreement(second)
    assert service.alias("previous") == first.name


def test_a_promotion_that_is_asked_to_end_undoes_itself(service: Service) -> None:
    first, second = service.releases
    process = service.start("promote", "--config", "tiny", "--run-dir", second.run_dir, "--force")
    pause_until(lambda: service.annotation(AD_HOC) == second.name or process.poll() is not None, 100)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    service.require_agreement(first)
    assert not holds_lease(service)


def test_two_at_once_end_in_agreement(service: Service) -> None:
    first, second = service.releases
    promotion = service.start("promote", "--config", "tiny", "--run-dir", second.run_dir, "--force")
    pause_until(lambda: holds_lease(service), 60)
    code, said = service.urm("rollback", "--config", "tiny", "--to", first.name, "--why", "at once")
    out, err = promotion.communicate(timeout=300)
    assert (code, promotion.returncode) == (0, 0), said + out + err
    service.require_agreement(first)
    assert service.alias("previous") == second.name


def test_a_rollback_by_hand_serves_at_once_and_sync_puts_the_aliases_right(service: Service) -> None:
    first, second = service.releases
    code, said = service.promote(second)
    assert code == 0, said
    service.require_agreement(second)
    for deployment in (WORKER, AD_HOC):
        service.kubectl("rollout", "undo", f"deployment/{deployment}")
        service.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout", "120s")
    pause_until(lambda: service.serving() == first.name, 60)
    assert service.alias("champion") == second.name
    code, said = service.urm("releases", "sync", "--config", "tiny")
    assert code == 0, said
    service.require_agreement(first)


def test_the_stage_promotes_from_a_pod_with_its_own_account(service: Service) -> None:
    """As a task of Airflow does it, from the template of stage pods; a copy of the registry comes along as a file."""
    second, kubectl = service.releases[1], service.kubectl
    kubectl("apply", "--server-side", "--filename", "-", given=json.dumps(promotion_pod(service, second)))
    pause_until(lambda: kubectl.read("pod", "promote")["status"].get("phase") == "Running", 60)
    kubectl("cp", str(service.home / "mlflow"), "promote:/cache/home/mlflow")
    kubectl("exec", "promote", "--", "touch", "/cache/home/ready")
    pause_until(lambda: kubectl.read("pod", "promote")["status"]["phase"] in ("Succeeded", "Failed"), 240)
    said = kubectl("logs", "promote", fails=True)
    assert kubectl.read("pod", "promote")["status"]["phase"] == "Succeeded", said
    kubectl("delete", "pod", "promote", "--wait=false")
    assert {service.annotation(WORKER), service.annotation(AD_HOC), service.serving()} == {second.name}
    # The registry of the tests has not seen it.
    code, said = service.urm("releases", "sync", "--config", "tiny")
    assert code == 0, said
    service.require_agreement(second)


def promotion_pod(service: Service, release: ClusterRelease) -> dict[str, Any]:
    """The pod of the stage; its command waits for a copy of the registry, and reads the tests' configuration."""
    pod: dict[str, Any] = yaml.safe_load((REPOSITORY / "k8s" / "jobs" / "stage-pod.yaml").read_text())
    pod["metadata"] = {"name": "promote", "labels": {"app.kubernetes.io/component": "promote"}}
    pod["spec"] |= {"serviceAccountName": "urm-promotion", "automountServiceAccountToken": True}
    wait = "mkdir -p /cache/home; until [ -e /cache/home/ready ]; do sleep 0.2; done"
    own = {
        "URM_HOME": "/cache/home",
        "URM_MLFLOW_URI": "",
        "URM_CONFIGS_DIR": "/etc/urm/configs",
        "URM_NUM_THREADS": "1",
        "URM_API_URL": f"http://{service.kubectl.address(API)}:8000",
    }
    (container,) = pod["spec"]["containers"]
    container["image"] = "urm-pipeline:0.1.0"
    container["command"] = ["sh", "-c", f"{wait}; urm promote --config tiny --run-dir {release.run_dir} --force"]
    container["env"] += [{"name": key, "value": text} for key, text in own.items()]
    container["envFrom"] = [{"configMapRef": {"name": "urm-settings"}}, {"secretRef": {"name": "urm-promotion"}}]
    container["volumeMounts"].append({"name": "configs", "mountPath": "/etc/urm/configs"})
    container["resources"] = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"cpu": "1", "memory": "2Gi"}}
    volumes: list[dict[str, Any]] = [{"name": name, "emptyDir": {"sizeLimit": "1Gi"}} for name in ("cache", "tmp")]
    pod["spec"]["volumes"] = [*volumes, {"name": "configs", "configMap": {"name": "test-configs"}}]
    return pod


def test_releases_lists_who_promoted_what(service: Service) -> None:
    code, said = service.urm("releases", "--config", "tiny")
    assert code == 0, said
    for release in service.releases:
        assert release.name in said.replace("\n", "")
