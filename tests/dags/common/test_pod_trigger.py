"""The trigger against a real HTTP server, which keeps pods and logs as a cluster does."""

import asyncio
import json
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from tests.worlds import pods
from tests.worlds.pods import pod_server

__all__ = ["pod_server"]

POD = {
    "metadata": {"name": "urm-sft", "namespace": "urm", "labels": {"task_id": "sft", "try_number": "1"}},
    "spec": {"containers": [{"name": "base", "resources": {"limits": {"memory": "64Gi"}}}]},
}


@pytest.fixture
def log():
    """What the trigger logs: the log of its task."""
    import dags.common.pod_trigger  # noqa: F401  # Airflow configures structlog when it is first imported

    with structlog.testing.capture_logs() as records:
        yield records


@pytest.fixture
def make_trigger(pod_server, monkeypatch, log):
    from dags.common import pod_trigger

    monkeypatch.setattr(pod_trigger, "POLL_SECONDS", 0.01)

    def make(**changes):
        """A trigger, made from what the database keeps of it."""
        kept = {"manifest": POD, "selector": "task_id=sft", "queue_seconds": 3600, "disruptions": 3}
        kept |= {"started": False, "conn_id": "kubernetes_default", "in_cluster": None, **changes}
        path, kwargs = pod_trigger.PodTrigger(**json.loads(json.dumps(kept))).serialize()
        assert path == "dags.common.pod_trigger.PodTrigger"
        return pod_trigger.PodTrigger(**json.loads(json.dumps(kwargs)))

    return make


async def first_event(trigger):
    async with asyncio.timeout(20):
        async for event in trigger.run():
            return event.payload


def watch(trigger):
    return asyncio.run(first_event(trigger))


def lines(log):
    """What was copied from the log of the pod."""
    return [record["event"] for record in log if record["event"].startswith("step")]


async def watch_until(trigger, condition):
    """Let the trigger run until something is so, and stop it as a killed triggerer does."""
    task = asyncio.create_task(first_event(trigger))
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_the_event_tells_the_end_and_the_pod(make_trigger, pod_server):
    pod_server.next = [pods.ended(2, message="first line\nsetting x: expected one, got two; correct it.")]
    event = watch(make_trigger())
    assert (event["outcome"], event["exit_code"]) == ("exited", 2)
    assert event["reason"].startswith("setting x")
    assert event["pod"] == {"name": "urm-sft", "uid": pod_server.pods["urm-sft"]["metadata"]["uid"]}


def test_the_log_is_copied_as_it_grows_each_line_once(make_trigger, pod_server, log):
    trigger = make_trigger()
    pod_server.write("urm-sft", "step 1", "step 2", at=datetime.now(UTC) - timedelta(seconds=300))

    async def live():
        task = asyncio.create_task(first_event(trigger))
        async with asyncio.timeout(20):
            while len(lines(log)) < 2:
                await asyncio.sleep(0.01)
            pod_server.write("urm-sft", "step 3", "step 3", "step 4")  # equal words, times a microsecond apart
            while len(lines(log)) < 5:
                await asyncio.sleep(0.01)
            pod_server.write("urm-sft", "step 5")
            pod_server.pods["urm-sft"]["status"] = pods.ended(0)
            await task

    asyncio.run(live())
    assert lines(log) == ["step 1", "step 2", "step 3", "step 3", "step 4", "step 5"]


def test_a_progress_bar_is_one_line_in_its_last_state(make_trigger, pod_server, log):
    pod_server.next = [pods.ended(0)]
    pod_server.write("urm-sft", "step 1: 0 %\rstep 1: 50 %\rstep 1: done", "step 2\r")
    assert watch(make_trigger())["outcome"] == "exited"
    assert lines(log) == ["step 1: done", "step 2"]


def test_what_a_node_says_of_a_log_that_is_gone_is_no_line_of_it(make_trigger, pod_server, log):
    """With status 200, in place of the log."""
    pod_server.next = [pods.ended(0)]
    pod_server.write("urm-sft", "step 1")
    pod_server.untimed = "failed to try resolving symlinks in path /var/log/pods/base/0.log: no such file"
    assert watch(make_trigger())["outcome"] == "exited"
    assert lines(log) == ["step 1"]
    assert "The log of pod urm-sft cannot be read now: failed to try resolving" in str(log)


def test_another_triggerer_goes_on_where_the_killed_one_stood(make_trigger, pod_server, log):
    """The pod, how many went before it, and where its log ended are found in the cluster."""
    pod_server.next = [pods.evicted(), pods.running()]
    pod_server.write("urm-sft-1", "step 1", "step 2")

    def noted():
        found = pod_server.pods.get("urm-sft-1", POD)
        return "urm.pod/logged-until" in found["metadata"].get("annotations", {})

    asyncio.run(watch_until(make_trigger(), noted))
    pod_server.write("urm-sft-1", "step 3")
    pod_server.pods["urm-sft-1"]["status"] = pods.evicted()
    pod_server.next = [pods.ended(0)]
    assert watch(make_trigger())["outcome"] == "exited"
    assert lines(log) == ["step 1", "step 2", "step 3"]
    assert [pod["metadata"]["name"] for pod in pod_server.created] == ["urm-sft", "urm-sft-1", "urm-sft-2"]


def test_times_of_a_log_are_told_by_their_ninth_decimal():
    from dags.common.pod_trigger import _moment

    times = ["2026-11-28T05:00:00.123456788Z", "2026-11-28T05:00:00.123456789Z", "2026-11-28T05:00:01Z"]
    assert sorted(reversed(times), key=_moment) == times


async def lose_pod(trigger, pod_server, condition):
    """Let the trigger run until something is so; then its pod vanishes, and the next one ends well."""
    task = asyncio.create_task(first_event(trigger))
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)
    pod_server.next = [pods.ended(0)]
    pod_server.pods.clear()
    return await task


def test_a_pod_that_vanished_is_followed_by_another(make_trigger, pod_server, log):
    trigger = make_trigger()
    event = asyncio.run(lose_pod(trigger, pod_server, lambda: any("runs on" in str(record) for record in log)))
    assert (event["outcome"], event["pod"]["name"]) == ("exited", "urm-sft-1")
    reason = "pod urm-sft is gone: the cluster or somebody deleted it. Another one follows in this try (1 of 3)."
    assert reason in str(log)


def test_why_a_pod_went_is_told_after_it(make_trigger, pod_server, log):
    """It got its condition while it ran, and vanished before its end was seen."""
    pod_server.next = [pods.running() | {"conditions": pods.evicted()["conditions"]}]
    trigger = make_trigger()
    asyncio.run(lose_pod(trigger, pod_server, lambda: trigger._disruption))
    assert "pod urm-sft is gone: EvictionByEvictionAPI: evicting" in str(log)


def test_another_pod_by_the_name_is_neither_trusted_nor_deleted(make_trigger, pod_server, log):
    trigger = make_trigger(disruptions=0)

    async def replace():
        task = asyncio.create_task(first_event(trigger))
        async with asyncio.timeout(20):
            while not trigger._said:
                await asyncio.sleep(0.01)
        pod_server.add(POD, pods.ended(0))
        return await task

    assert asyncio.run(replace())["outcome"] == "disrupted"
    assert pod_server.deleted == []


def test_a_pod_that_is_not_being_deleted_is_the_tasks(make_trigger, pod_server):
    """Another one, younger or not, may stand on a lost node for long."""
    lost = {**POD, "metadata": {**POD["metadata"], "name": "urm-sft-lost", "deletionTimestamp": pods.time(-5)}}
    there = pod_server.add(POD, pods.ended(0))
    there["metadata"]["creationTimestamp"] = pods.time(30)
    pod_server.add(lost, pods.running())
    assert watch(make_trigger(started=True))["pod"]["uid"] == there["metadata"]["uid"]


@pytest.mark.parametrize(("disruptions", "created", "outcome"), [(3, ["urm-sft-1"], "exited"), (0, [], "disrupted")])
def test_a_pod_that_went_while_nobody_watched_counts(disruptions, created, outcome, make_trigger, pod_server):
    """A command that must not run twice (no disruptions) is not started again."""
    pod_server.next = [pods.ended(0)]
    assert watch(make_trigger(started=True, disruptions=disruptions))["outcome"] == outcome
    assert [pod["metadata"]["name"] for pod in pod_server.created] == created


def test_a_pod_of_an_earlier_try_counts_not(make_trigger, pod_server):
    """The task was cleared: the earlier try's trigger deletes its pod, and this try, which has none, starts one."""
    notes = {"annotations": {"urm.pod/disruptions": "3"}}
    pod_server.add({**POD, "metadata": {**POD["metadata"], **notes}}, pods.evicted())
    pod_server.next = [pods.ended(0)]
    later = {
        **POD,
        "metadata": {**POD["metadata"], "name": "urm-sft-b", "labels": {"task_id": "sft", "try_number": "2"}},
    }
    event = watch(make_trigger(manifest=later, started=True, disruptions=0))
    assert (event["outcome"], event["pod"]["name"]) == ("exited", "urm-sft-b")


def test_a_clearing_spares_the_pod_of_the_next_try(make_trigger, pod_server, log):
    trigger = make_trigger()
    asyncio.run(watch_until(trigger, lambda: "runs on" in str(log)))
    later = pod_server.add({**POD, "metadata": {**POD["metadata"], "name": "urm-sft-b"}}, pods.running())
    asyncio.run(trigger.on_kill())
    assert list(pod_server.pods.values()) == [later]


def test_marking_the_task_deletes_its_pod(make_trigger, pod_server):
    trigger, there = make_trigger(started=True), pod_server.add(POD, pods.running())
    asyncio.run(trigger.on_kill())
    assert pod_server.deleted == [("urm-sft", there["metadata"]["uid"])]
    asyncio.run(trigger.on_kill())  # gone already


def test_a_cluster_that_does_not_answer_is_waited_for(make_trigger, pod_server, log):
    pod_server.next = [pods.ended(0)]
    pod_server.refused = {"GET": [(503, "busy")] * 5, "POST": [(503, "busy"), (429, "slow down")]}
    assert watch(make_trigger())["outcome"] == "exited"
    assert "The cluster does not answer: 503" in str(log)


def test_a_pod_whose_creation_was_not_answered_is_there(make_trigger, pod_server):
    """The request arrived, its answer was lost, and the next one hears that the name is taken."""
    trigger = make_trigger(selector="task_id=other")
    pod_server.add(POD, pods.ended(0))
    assert watch(trigger)["outcome"] == "exited"


def test_a_triggerer_without_rights_says_so(make_trigger, pod_server, monkeypatch):
    from dags.common import pod_end

    monkeypatch.setattr(pod_end, "MISSING_SECONDS", 0)
    pod_server.refused["GET"] = [(403, "forbidden")] * 50
    event = watch(make_trigger())
    assert event["outcome"] == "failed"
    assert "expected the rights of the role urm-airflow in namespace urm, got 403 Forbidden; bind" in event["reason"]


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (403, 'error looking up service account urm/urm-training: serviceaccount "urm-training" not found'),
        (422, "spec.containers[0].resources: Invalid value"),
    ],
)
def test_a_pod_that_the_cluster_does_not_take_is_given_up(status, message, make_trigger, pod_server):
    pod_server.refused["POST"] = [(status, message)]
    event = watch(make_trigger())
    assert (event["outcome"], event["pod"]) == ("hopeless", None)
    assert event["reason"] == f"pod urm-sft: expected the cluster to take it, got {message}; correct what it names."


def test_a_full_quota_is_waited_for_like_a_node(make_trigger, pod_server):
    full = (403, "pods is forbidden: exceeded quota: gpus")
    pod_server.next, pod_server.refused["POST"] = [pods.ended(0)], [full, full]
    assert watch(make_trigger())["outcome"] == "exited"
    pod_server.pods.clear()
    pod_server.refused["POST"] = [full]
    assert watch(make_trigger(queue_seconds=-1))["outcome"] == "hopeless"


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "registry.example/urm:9"'),
        ("CreateContainerConfigError", 'secret "urm-training" not found'),
    ],
)
def test_a_wrong_image_or_secret_ends_the_wait(make_trigger, reason, message, pod_server, monkeypatch, log):
    from dags.common import pod_end

    monkeypatch.setattr(pod_end, "MISSING_SECONDS", 0)
    pod_server.next = [pods.waiting(reason, message)]
    event = watch(make_trigger())
    assert event["outcome"] == "hopeless"
    assert f"got {reason}: {message}; correct the image, secret or settings that it names" in event["reason"]
    assert f"Pod urm-sft starts on node node-1: {reason}: {message}" in str([record["event"] for record in log])


def test_the_wait_for_a_node_ends_at_its_limit(make_trigger, pod_server):
    queued = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available", "reason": "x"}
    pod_server.next = [{"phase": "Pending", "conditions": [queued]}]
    event = watch(make_trigger(queue_seconds=-1))
    assert event["outcome"] == "hopeless"
    assert "0/2 nodes are available" in event["reason"]
