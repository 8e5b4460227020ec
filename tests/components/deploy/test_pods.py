from typing import Any

import pytest

from components.deploy.pods import Trouble, explain_pod, find_trouble, is_complete

LIMITED = {"containers": [{"name": "recall", "resources": {"limits": {"memory": "1Gi"}}}]}


def pod(phase: str = "Pending", spec: Any = LIMITED, **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "w-1"}, "spec": spec, "status": {"phase": phase, **status}}


def container(name: str = "recall", restarts: int = 0, last: Any = None, **state: Any) -> dict[str, Any]:
    found = {"name": name, "image": "r.example/urm:1", "restartCount": restarts, "state": state}
    return found | ({"lastState": {"terminated": last}} if last else {})


def deployment(generation: int = 2, **status: Any) -> dict[str, Any]:
    counts = {"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}
    return {
        "metadata": {"name": "recall-worker", "generation": generation},
        "spec": {"replicas": 2},
        "status": counts | status,
    }


WRONG_HASH = "12:00:01 [info] fetching\nerror bundle /b: expected SHA-256 1a…, got 2b…; build again.\n"
BACK_OFF = {"reason": "CrashLoopBackOff", "message": "back-off 10s restarting failed container"}
SENTENCES = [
    (
        pod(containerStatuses=[container(waiting={"reason": "ImagePullBackOff", "message": "not found: urm:1"})]),
        "pod w-1, container recall: image r.example/urm:1 cannot be pulled (not found: urm:1)",
        False,
    ),
    (
        pod(containerStatuses=[container(waiting={"reason": "InvalidImageName", "message": "bad"})]),
        "pod w-1, container recall: image r.example/urm:1 cannot be pulled (bad)",
        True,
    ),
    (
        pod(initContainerStatuses=[container("fetch", 1, {"exitCode": 2, "message": WRONG_HASH}, waiting=BACK_OFF)]),
        "pod w-1, container fetch: ended with exit code 2: bundle /b: expected SHA-256 1a…, got 2b…; build again",
        True,
    ),
    (
        pod("Running", containerStatuses=[container(last={"exitCode": 137, "reason": "OOMKilled"}, waiting=BACK_OFF)]),
        "pod w-1, container recall: was killed for memory (OOMKilled, limit 1Gi)",
        False,
    ),
    (
        pod("Running", containerStatuses=[container(restarts=2, last={"exitCode": 1, "message": "a\nworker failed"})]),
        "pod w-1, container recall: ended with exit code 1: worker failed",
        True,
    ),
    (
        pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: Insufficient memory."}]),
        "pod w-1: cannot be scheduled (0/3 nodes: Insufficient memory)",
        False,
    ),
    (
        pod(containerStatuses=[container(waiting={"reason": "CreateContainerConfigError", "message": "no secret x"})]),
        "pod w-1, container recall: CreateContainerConfigError (no secret x)",
        False,
    ),
    (
        pod("Running", containerStatuses=[container(running={})]),
        "pod w-1: runs but is not ready (Readiness probe failed: 503)",
        False,
    ),
    (
        pod(containerStatuses=[container(waiting={"reason": "PodInitializing"})]),
        "pod w-1: is still pending (Readiness probe failed: 503)",
        False,
    ),
]


@pytest.mark.parametrize(("found", "reason", "final"), SENTENCES, ids=lambda value: "")
def test_why_a_pod_is_stuck_is_one_sentence(found: dict[str, Any], reason: str, final: bool) -> None:
    def warnings(name: str) -> list[str]:
        assert name == "w-1"
        return ["Back-off", "Readiness probe failed: 503"]

    assert explain_pod(found, warnings) == Trouble(reason, final)


def test_a_ready_pod_and_one_whose_init_container_ended_well_are_no_trouble() -> None:
    assert explain_pod(pod("Running", conditions=[{"type": "Ready", "status": "True"}]), lambda _: []) is None
    began = pod(initContainerStatuses=[container("fetch", terminated={"exitCode": 0})])
    assert explain_pod(began, lambda _: []) == Trouble("pod w-1: is still pending")


def test_the_trouble_of_a_rollout_is_the_final_one_of_its_pods_else_that_of_the_deployment() -> None:
    pods = [SENTENCES[3][0], SENTENCES[2][0]]
    assert find_trouble(deployment(), pods, lambda _: []) == Trouble(SENTENCES[2][1], True)
    refused = {"type": "ReplicaFailure", "status": "True", "message": "forbidden: violates PodSecurity"}
    late = {"type": "Progressing", "reason": "ProgressDeadlineExceeded"}
    found = find_trouble(deployment(conditions=[refused, late]), [], lambda _: [])
    assert found == Trouble("recall-worker: no pod can be made (forbidden: violates PodSecurity)", True)
    unseen = find_trouble(deployment(generation=3, conditions=[refused, late]), [], lambda _: [])
    assert not unseen.final  # these are of the template before
    assert "no pod can be made" not in unseen.reason
    waiting = find_trouble(deployment(), [], lambda _: [])
    assert waiting == Trouble("recall-worker: 0 of 2 new pods, the old ones are not gone yet")


@pytest.mark.parametrize(
    ("status", "complete"),
    [
        ({}, True),
        ({"generation": 3}, False),  # the controller has not seen the newest template
        ({"updatedReplicas": 1, "replicas": 2}, False),
        ({"replicas": 3}, False),  # an old pod is still there
        ({"availableReplicas": 1}, False),
    ],
)
def test_a_rollout_is_complete_as_kubectl_says(status: dict[str, int], complete: bool) -> None:
    assert is_complete(deployment(**status)) is complete
