import json
import re
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from tests.worlds import pods


def now():
    return datetime.now(UTC)


def pod_of(status, deleted: float | None = None, created: float = 0):
    """A pod as the client reads it; it was created, and its deletion ends, so many seconds ago."""
    from kubernetes.client import ApiClient

    metadata = {"name": "urm-sft-1", "creationTimestamp": pods.time(created)}
    if deleted is not None:
        metadata["deletionTimestamp"] = pods.time(deleted)
    limits = {"limits": {"memory": "64Gi", "ephemeral-storage": "20Gi"}}
    spec = {"activeDeadlineSeconds": 7200, "containers": [{"name": "base", "resources": limits}], "nodeName": "node-1"}
    content = json.dumps({"metadata": metadata, "spec": spec, "status": status})
    return ApiClient().deserialize(SimpleNamespace(data=content), "V1Pod")


def refused(reason):
    return {"phase": "Failed", "reason": reason, "message": "no", "conditions": [pods.scheduled()]}


DISK = "Pod ephemeral local storage usage exceeds the total limit of containers 20Gi. "
ENDS = {
    "done": (pods.ended(0), "exited", "^$"),
    "done while it was evicted": (pods.ended(0) | {"conditions": pods.evicted()["conditions"]}, "exited", "^$"),
    "mistake": (pods.ended(2, message="option --set: expected one"), "exited", "option --set"),
    "error": (pods.ended(1, message="Traceback"), "exited", "Traceback"),
    "killed": (pods.ended(137), "exited", "Error"),
    "memory": (pods.ended(137, "OOMKilled"), "failed", r"at most 64Gi of memory, got OOMKilled; raise `memory` in the"),
    "hours": (pods.ended(143, reason="Error") | {"reason": "DeadlineExceeded"}, "failed", "at most 2 h of run time"),
    "disk": (pods.ended(137) | {"reason": "Evicted", "message": DISK}, "failed", r"20Gi of disk, got .*; raise `ephem"),
    "no program": (
        pods.ended(128, "StartError", 'exec: "urm": not found'),
        "hopeless",
        'got exec: "urm": not found; correct `image`',
    ),
    "evicted": (pods.evicted(), "disrupted", "EvictionByEvictionAPI: evicting"),
    "shutdown": (pods.ended(137) | {"reason": "Terminated", "message": "node shutdown"}, "disrupted", "node shutdown"),
    "node came back": (pods.ended(255, "Unknown"), "disrupted", r"its node lost it \(Unknown\)"),
    "asked to stop": (pods.ended(143), "disrupted", "asked to stop"),
    "refused by its node": (refused("UnexpectedAdmissionError"), "disrupted", "UnexpectedAdmissionError: no"),
}


@pytest.mark.parametrize("case", ENDS)
def test_who_ended_the_pod(case):
    from dags.common.pod_end import judge_end

    status, outcome, reason = ENDS[case]
    found = judge_end(pod_of(status), now())
    assert found.outcome == outcome
    assert re.search(reason, found.reason), found.reason


def test_an_error_of_a_deleted_pod_is_not_its_own():
    from dags.common.pod_end import judge_end

    assert judge_end(pod_of(pods.ended(1), deleted=-30), now()).outcome == "disrupted"


def test_a_pod_whose_node_does_not_answer_is_given_up():
    from dags.common.pod_end import judge_end

    assert judge_end(pod_of(pods.running(), deleted=-30), now()) is None
    assert judge_end(pod_of(pods.running(), deleted=30), now()) is None
    assert judge_end(pod_of(pods.running(), deleted=90), now()).outcome == "disrupted"


def test_the_end_of_the_pod_is_waited_for_a_little():
    """The container's end comes first; what ended it may come later."""
    from dags.common.pod_end import judge_end

    def container(ago):
        end = {"exitCode": 1, "finishedAt": pods.time(ago)}
        return pod_of(pods.running() | {"containerStatuses": pods.base(terminated=end)})

    assert judge_end(container(5), now()) is None
    assert judge_end(container(60), now()).exit_code == 1


QUEUED = {"type": "PodScheduled", "status": "False", "message": "2 Insufficient nvidia.com/gpu", "reason": "x"}


def test_the_queue_has_its_own_limit():
    from dags.common.pod_end import describe, judge_wait

    def pod(created):
        return pod_of({"phase": "Pending", "conditions": [QUEUED]}, created=created)

    assert judge_wait(pod(3500), now(), 3600, None) is None
    found = judge_wait(pod(3700), now(), 3600, None)
    assert found.outcome == "hopeless"
    assert "expected a node within 1 h, got 2 Insufficient nvidia.com/gpu; free one" in found.reason
    assert describe(pod(0)) == "waits for a node: 2 Insufficient nvidia.com/gpu"
    assert judge_wait(pod_of(pods.waiting("ContainerCreating", ""), created=9999), now(), 3600, None) is None


@pytest.mark.parametrize(
    ("reason", "since", "given_up"),
    [
        ("InvalidImageName", 0, True),
        ("ErrImagePull", 0, False),
        ("ErrImagePull", 121, True),
        ("CreateContainerConfigError", 121, True),
        ("ContainerCreating", 121, False),
    ],
)
def test_what_is_missing_may_be_a_little_late(reason, since, given_up):
    from dags.common.pod_end import judge_wait

    pod = pod_of(pods.waiting(reason, 'secret "urm-data" not found'))
    found = judge_wait(pod, now(), 3600, now() - timedelta(seconds=since))
    assert (found is not None) is given_up
    if found:
        assert found.outcome == "hopeless"
        assert f'got {reason}: secret "urm-data" not found; correct' in found.reason


def test_a_start_that_takes_too_long_is_tried_again():
    from dags.common.pod_end import judge_wait

    assert judge_wait(pod_of(pods.waiting("ContainerCreating", "", ago=1700)), now(), 3600, None) is None
    assert judge_wait(pod_of(pods.waiting("ContainerCreating", "", ago=1900)), now(), 3600, None).outcome == "failed"
