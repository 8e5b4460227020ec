"""The trigger against a real HTTP server with a Job and its pods; tests/cluster/test_backfill.py has a cluster."""

import asyncio
import re

import pytest

from tests.worlds import pods
from tests.worlds.http_server import connect_airflow, serve

JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"name": "recall-backfill", "namespace": "urm", "uid": "uid-1"},
    "spec": {"completions": 2, "template": {"spec": {"containers": [{"name": "backfill"}]}}},
    "status": {"active": 2},
}
LABELS = {"batch.kubernetes.io/controller-uid": "uid-1", "batch.kubernetes.io/job-completion-index": "0"}


def of_backfill(status):
    """The status, of the container of a back-fill."""
    for one in status["containerStatuses"]:
        one["name"] = "backfill"
    return status


class JobServer:
    """One Job, the statuses of its pods, and how often it was asked; `refused` is the status of every answer."""

    def __init__(self):
        self.statuses, self.refused, self.asked = [], 0, 0
        self.ended = []

    def answer(self, method, path, _, body):
        self.asked += 1
        if self.refused:
            return self.refused, {"kind": "Status", "message": "no"}
        if re.search(r"/jobs/recall-backfill$", path):
            return 200, {**JOB, "status": {**JOB["status"], "conditions": self.ended}}
        if path.endswith("/log?tailLines=1"):
            return 200, "starting"
        found = [
            {
                "metadata": {"name": f"pod-{number}", "labels": LABELS, "creationTimestamp": pods.time()},
                "spec": {"containers": [{"name": "backfill"}]},
                "status": status,
            }
            for number, status in enumerate(self.statuses)
        ]
        return 200, {"items": found}


@pytest.fixture
def server(tmp_path, monkeypatch):
    from dags.common import backfill_trigger, pod_end, pod_trigger

    for module, name, seconds in [
        (backfill_trigger, "POLL_SECONDS", 0.01),
        (backfill_trigger, "REPORT_SECONDS", 0.01),
        (backfill_trigger, "MISSING_SECONDS", 0.5),
        (pod_end, "MISSING_SECONDS", 0.5),
    ]:
        monkeypatch.setattr(module, name, seconds)
    assert pod_trigger.pod_end is pod_end
    state = JobServer()
    with serve(state.answer) as address:
        connect_airflow(address, "urm", tmp_path, monkeypatch)
        yield state


def watch(seconds=20, then=None):
    """The event; `then` is called while it is waited for, after half a second more than what is missing may take."""
    from dags.common.backfill_trigger import BackfillTrigger

    trigger = BackfillTrigger(
        namespace="urm", name="recall-backfill", uid="uid-1", conn_id="kubernetes_default", in_cluster=None
    )

    async def first():
        async for event in trigger.run():
            return event.payload

    async def act():
        if then:
            await asyncio.sleep(1.0)
            then()

    async def both():
        async with asyncio.timeout(seconds):
            return (await asyncio.gather(first(), act()))[0]

    return asyncio.run(both())


NO_IMAGE = pods.waiting("ImagePullBackOff", "Back-off pulling image urm-recall-worker:0.1.0")


def test_a_job_whose_pods_all_lack_what_they_need_is_given_up(server):
    server.statuses = [of_backfill(pods.waiting("ErrImagePull", "no registry")), of_backfill(NO_IMAGE)]
    event = watch()
    assert (event["hopeless"], event["uid"], event["complete"]) == (True, "uid-1", False)
    assert event["reason"].startswith("pod pod-0: expected all it needs to start, got ErrImagePull: no registry; ")


def test_one_whose_other_pod_runs_or_waits_for_a_node_is_not(server):
    complete = {"type": "Complete", "status": "True"}
    for other in (of_backfill(pods.running()), {"phase": "Pending", "conditions": []}):
        server.ended, server.statuses = [], [of_backfill(NO_IMAGE), other]
        assert watch(then=lambda: server.ended.append(complete))["complete"]


def test_a_cluster_that_denies_access_for_a_while_is_said(server):
    server.refused = 403
    event = watch()
    assert "hopeless" not in event  # the Job may do well: the next try looks again
    assert event["reason"] == (
        "triggerer: expected the rights of the role urm-airflow in namespace urm, got 403 Forbidden; "
        "bind its account to the role."
    )


def test_one_that_does_not_answer_is_asked_again(server):
    server.refused = 503

    def answer_again():
        server.refused = 0
        server.ended.append({"type": "Complete", "status": "True"})

    assert watch(then=answer_again)["complete"]
    assert server.asked > 3
