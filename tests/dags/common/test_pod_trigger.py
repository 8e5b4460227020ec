"""The trigger against a real HTTP server, which keeps pods and logs as a cluster does."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from tests.worlds import pods
from tests.worlds.pods import pod_server

__all__ = ["pod_server"]

POD = {
    "metadata": {"name": "urm-sft-1", "labels": {"task_id": "sft"}},
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

    def make(status, **changes):
        """A pod and its trigger, made from what the database keeps of it."""
        pod = pod_server.pods.get("urm-sft-1") or pod_server.add(POD, status)
        kept = {"namespace": "urm", "name": "urm-sft-1", "uid": pod["metadata"]["uid"], "queue_seconds": 3600}
        kept |= {"disruptions": 3, "conn_id": "kubernetes_default", "in_cluster": None, **changes}
        path, kwargs = pod_trigger.PodTrigger(**kept).serialize()
        assert path == "dags.common.pod_trigger.PodTrigger"
        return pod_trigger.PodTrigger(**kwargs)

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


def test_the_event_carries_the_end_and_the_count(make_trigger):
    event = watch(make_trigger(pods.ended(2, message="setting x: expected one, got two; correct it.")))
    assert (event["outcome"], event["exit_code"], event["disruptions"]) == ("exited", 2, 3)
    assert event["reason"].startswith("setting x")


def test_the_log_is_copied_as_it_grows_each_line_once(make_trigger, pod_server, log):
    trigger = make_trigger(pods.running())
    pod_server.write("urm-sft-1", "step 1", "step 2", at=datetime.now(UTC) - timedelta(seconds=300))

    async def live():
        task = asyncio.create_task(first_event(trigger))
        async with asyncio.timeout(20):
            while len(lines(log)) < 2:
                await asyncio.sleep(0.01)
            pod_server.write("urm-sft-1", "step 3", "step 3", "step 4")  # equal words, times a microsecond apart
            while len(lines(log)) < 5:
                await asyncio.sleep(0.01)
            pod_server.write("urm-sft-1", "step 5")
            pod_server.pods["urm-sft-1"]["status"] = pods.ended(0)
            await task

    asyncio.run(live())
    assert lines(log) == ["step 1", "step 2", "step 3", "step 3", "step 4", "step 5"]


def test_a_progress_bar_is_one_line_in_its_last_state(make_trigger, pod_server, log):
    trigger = make_trigger(pods.ended(0))
    pod_server.write("urm-sft-1", "step 1: 0 %\rstep 1: 50 %\rstep 1: done", "step 2\r")
    assert watch(trigger)["outcome"] == "exited"
    assert lines(log) == ["step 1: done", "step 2"]


def test_another_triggerer_goes_on_where_the_killed_one_stood(make_trigger, pod_server, log):
    def noted():
        return "urm.pod/logged-until" in pod_server.pods["urm-sft-1"]["metadata"].get("annotations", {})

    trigger = make_trigger(pods.running())
    pod_server.write("urm-sft-1", "step 1", "step 2")
    asyncio.run(watch_until(trigger, noted))
    pod_server.write("urm-sft-1", "step 3")
    pod_server.pods["urm-sft-1"]["status"] = pods.ended(0)
    assert watch(make_trigger(None))["outcome"] == "exited"
    assert lines(log) == ["step 1", "step 2", "step 3"]


def test_times_of_a_log_are_told_by_their_ninth_decimal():
    from dags.common.pod_trigger import _moment

    times = ["2026-11-28T05:00:00.123456788Z", "2026-11-28T05:00:00.123456789Z", "2026-11-28T05:00:01Z"]
    assert sorted(reversed(times), key=_moment) == times


def test_a_pod_that_is_gone_is_a_disruption(make_trigger, pod_server):
    trigger = make_trigger(pods.running())
    pod_server.pods.clear()
    event = watch(trigger)
    assert event["outcome"] == "disrupted"
    assert event["reason"] == "pod urm-sft-1 is gone: the cluster or somebody deleted it"


def test_why_a_pod_went_is_told_after_it(make_trigger, pod_server):
    """It got its condition while it ran, and vanished before its end was seen."""
    trigger = make_trigger(pods.running() | {"conditions": pods.evicted()["conditions"]})

    async def vanish():
        task = asyncio.create_task(first_event(trigger))
        async with asyncio.timeout(20):
            while not trigger._disruption:
                await asyncio.sleep(0.01)
        pod_server.pods.clear()
        return await task

    assert asyncio.run(vanish())["reason"] == "pod urm-sft-1 is gone: EvictionByEvictionAPI: evicting"


def test_another_pod_by_the_name_is_neither_trusted_nor_deleted(make_trigger, pod_server):
    trigger = make_trigger(pods.ended(0), uid="an earlier one")
    assert watch(trigger)["outcome"] == "disrupted"
    asyncio.run(trigger.on_kill())
    assert pod_server.deleted == []


def test_marking_the_task_deletes_its_pod(make_trigger, pod_server):
    trigger = make_trigger(pods.running())
    asyncio.run(trigger.on_kill())
    assert pod_server.deleted == [("urm-sft-1", trigger.uid)]
    asyncio.run(trigger.on_kill())  # gone already


def test_a_cluster_that_does_not_answer_is_waited_for(make_trigger, pod_server, log):
    trigger = make_trigger(pods.ended(0))
    pod_server.refused["GET"] = [(503, "busy")] * 5
    assert watch(trigger)["outcome"] == "exited"
    assert "The cluster does not answer: 503" in str(log)


def test_a_triggerer_without_rights_says_so(make_trigger, pod_server, monkeypatch):
    from dags.common import pod_end

    monkeypatch.setattr(pod_end, "MISSING_SECONDS", 0)
    trigger = make_trigger(pods.running())
    pod_server.refused["GET"] = [(403, "forbidden")] * 50
    event = watch(trigger)
    assert event["outcome"] == "failed"
    assert "expected the rights of the role urm-airflow in namespace urm, got 403 Forbidden; bind" in event["reason"]


@pytest.mark.parametrize(
    ("reason", "message"),
    [
        ("ImagePullBackOff", 'Back-off pulling image "registry.example/urm:9"'),
        ("CreateContainerConfigError", 'secret "urm-training" not found'),
    ],
)
def test_a_wrong_image_or_secret_ends_the_wait(make_trigger, reason, message, monkeypatch, log):
    from dags.common import pod_end

    monkeypatch.setattr(pod_end, "MISSING_SECONDS", 0)
    event = watch(make_trigger(pods.waiting(reason, message)))
    assert event["outcome"] == "hopeless"
    assert f"got {reason}: {message}; correct the image, secret or settings that it names" in event["reason"]
    assert f"Pod urm-sft-1 starts on node node-1: {reason}: {message}" in str(log)


def test_the_wait_for_a_node_ends_at_its_limit(make_trigger):
    queued = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes are available", "reason": "x"}
    event = watch(make_trigger({"phase": "Pending", "conditions": [queued]}, queue_seconds=-1))
    assert event["outcome"] == "hopeless"
    assert "0/2 nodes are available" in event["reason"]
