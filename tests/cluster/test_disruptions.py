"""Stand-ins without a cluster: tests/faults, tests/k8s/test_policies.py (budgets, preStop, grace)."""

import time

import pytest

from components.release.publication import live_workers
from tests.cluster.load import load
from tests.cluster.world import API, PASSWORD, WORKER, Service, is_ready, pause_until


def ready(service: Service, component: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in service.kubectl.pods(component) if is_ready(pod)]


def test_api_pods_deleted_one_after_the_other_fail_no_read(service: Service) -> None:
    with load(service) as found:
        for name in ready(service, API):
            service.kubectl("delete", "pod", name, "--wait=false")
            pause_until(lambda name=name: len(ready(service, API)) == 2 and name not in ready(service, API), 90)
        time.sleep(1)
    print(found.outcomes, found.sent)
    assert (found.failed, found.went_back, found.refused) == ({}, [], 0)


def test_workers_deleted_and_killed_lose_no_event(service: Service) -> None:
    with load(service, 50) as found:
        for grace in ("45", "0"):
            name = ready(service, WORKER)[0]
            service.kubectl(
                "delete", "pod", name, "--wait=false", f"--grace-period={grace}", *["--force"] * (grace == "0")
            )
            pause_until(lambda name=name: len(ready(service, WORKER)) == 2 and name not in ready(service, WORKER), 120)
    assert (found.failed, found.went_back) == ({}, [])


def test_a_restart_of_all_workers_loses_no_event_and_leaves_no_worker_behind(service: Service) -> None:
    """As an upgrade of the code does it: old and new pods work on one stream for a while."""
    service.kubectl("rollout", "restart", f"deployment/{WORKER}")
    with load(service, 50) as found:
        service.kubectl("rollout", "status", f"deployment/{WORKER}", "--timeout", "180s")
    assert (found.failed, found.went_back) == ({}, [])
    names = {pod["metadata"]["name"] for pod in service.kubectl.pods(WORKER)}

    def alive() -> set[str]:
        return {name.rsplit("-", 2)[0] for name in live_workers(service.redis) if name.startswith(WORKER)}

    pause_until(lambda: alive() == names, 60)  # the old ones have ended, or soon will have


def test_a_drain_waits_for_the_budget(service: Service) -> None:
    """Pods leave a node one by one; with one node, their successors wait for it to take pods again."""
    nodes = [node["metadata"]["name"] for node in service.kubectl.read("nodes")["items"]]
    node = service.kubectl.pods(WORKER)[0]["spec"]["nodeName"]
    budget = service.kubectl.read("poddisruptionbudget", WORKER)
    assert budget["status"]["disruptionsAllowed"] == 1
    selector = f"app.kubernetes.io/component={WORKER}"
    service.kubectl("cordon", node)
    try:
        how = ["--pod-selector", selector, "--delete-emptydir-data", "--ignore-daemonsets", "--timeout", "40s"]
        said = service.kubectl("drain", node, *how, fails=True)
        if len(nodes) == 1:
            assert "Cannot evict pod as it would violate the pod's disruption budget" in said
            assert len(ready(service, WORKER)) == 1, "one goes on serving"
        else:
            assert "drained" in said
            pause_until(lambda: len(ready(service, WORKER)) == 2, 120)
            assert all(pod["spec"]["nodeName"] != node for pod in service.kubectl.pods(WORKER))
        assert service.serving() == service.releases[0].name
    finally:
        service.kubectl("uncordon", node)
    pause_until(lambda: len(ready(service, WORKER)) == 2, 120)


@pytest.mark.parametrize("component", [WORKER, API])
def test_a_pod_says_nothing_secret_and_cannot_write_its_root(service: Service, component: str) -> None:
    name = ready(service, component)[0]
    said = service.kubectl(
        "exec", name, "--", "sh", "-c", "id -u; touch /app/x; cat /proc/1/status | grep CapEff", fails=True
    )
    assert "10001" in said
    assert "Read-only file system" in said
    assert "CapEff:\t0000000000000000" in said
    log = service.kubectl("logs", name)
    assert service.environment["URM_API_TOKEN"] not in log
    assert PASSWORD not in log
