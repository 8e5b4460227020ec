import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import redis

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import ReleaseError
from components.recall.operate.deadletters import list_letters
from components.recall.operate.intake import feed
from components.recall.serving.context import build_context
from components.recall.serving.engine import Ranking, ServingRelease, load_release
from components.recall.state.events import encode_event
from components.recall.state.scripts import STREAM, history_keys, waiting_key
from components.recall.state.store import UserStore
from components.recall.state.stream import EventStream
from components.recall.worker import stream as worker_module
from components.recall.worker.fixed import FixedRelease
from components.recall.worker.stream import RecallWorker
from components.redis_client import open_redis
from components.release.publication import SERVING, WANTED, Publication, live_workers, read_publication
from components.urm.data.request import RecallRequest
from tests.worlds.recall import (
    Release,
    StartWorker,
    await_worker,
    backlog,
    make_event,
    runtime_process,
    wait_until,
)
from tests.worlds.servers import RedisServer, free_port
from tests.worlds.tiny import NUM_USERS

SETTINGS = ("claim_idle_seconds=0.5", "max_wait_ms=5", "batch_size=4", "k=10")  # of a worker in a process of its own
OPTIONS = [part for setting in SETTINGS for part in ("--set", f"recall.{setting}")]


class ForgetfulRedis(redis.Redis):
    """Loses all that it holds just before the command of this number; a pipeline counts as one."""

    commands = 0
    forgets_at = 0

    def _count(self) -> None:
        self.commands += 1
        if self.commands == self.forgets_at:
            with redis.Redis(connection_pool=self.connection_pool) as other:
                other.flushall()

    def execute_command(self, *arguments: Any, **options: Any) -> Any:
        self._count()
        return super().execute_command(*arguments, **options)

    def pipeline(self, *arguments: Any, **options: Any) -> Any:
        pipe = super().pipeline(*arguments, **options)
        execute = pipe.execute

        def count_and_execute(**how: Any) -> Any:
            self._count()
            return execute(**how)

        pipe.execute = count_and_execute
        return pipe


def test_event_becomes_the_result_that_the_model_gives(
    client: redis.Redis,
    releases: tuple[Release, Release],
    promoted: tuple[RecallWorker, Publication],
    recall_config: RecallConfig,
) -> None:
    event = make_event()
    feed(client, iter([event]), recall_config)
    wait_until(lambda: backlog(client) == 0)
    store = UserStore(client, recall_config)
    release = load_release(promoted[1], releases[0].settings, releases[0].config.release)
    context = build_context(release.read_histories(["3"])["3"], [event], release.rule)
    assert context.item_ids[0] == event.item_id
    for task in release.tasks[:2]:
        result = store.result("3", task.name)
        ((items, scores),) = release.recommend([RecallRequest(context, task)], recall_config.k)
        assert result is not None
        assert result.item_ids == items
        assert result.scores == pytest.approx(scores, abs=1e-4)
        assert (result.release, result.event_id, result.event_ts) == (release.name, event.event_id, event.ts)
        if task.exclude_bought:
            assert not set(result.item_ids) & set(context.item_ids.tolist())
    assert store.result("3", "text_query") is None  # nobody asked anything

    feed(client, iter([make_event(item_id=None, query="shelf 3", minutes=61)]), recall_config)
    wait_until(lambda: backlog(client) == 0)
    answer = store.result("3", "text_query")
    assert answer is not None and answer.query == "shelf 3"


def test_many_events_of_a_user_are_one_inference(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
) -> None:
    events = [make_event(minutes=minute, event_id=f"e{minute}") for minute in range(10, 20)]
    feed(client, iter(events), recall_config)  # a worker without a release leaves them where they are
    contexts: list[list[int]] = []  # of each call, the ids of the contexts asked

    class RecordingRelease(ServingRelease):
        def recommend(self, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
            contexts.append([id(request.context) for request in requests])
            return super().recommend(requests, k)

    def load(publication: Publication) -> ServingRelease:
        release = load_release(publication, releases[0].settings, releases[0].config.release)
        return RecordingRelease(**vars(release))

    start_worker(load=load)
    assert backlog(client) == 10
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: backlog(client) == 0)
    result = UserStore(client, recall_config).result("3", "next_purchase")
    assert result is not None and result.event_id == "e19"
    (asked,) = contexts
    assert len(asked) == 2  # both tasks that need no query
    assert len(set(asked)) == 1  # of one context, whose prefix is computed once


def test_late_event_joins_the_history_and_does_not_turn_time_back(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    store = UserStore(client, recall_config)
    feed(client, iter([make_event(minutes=60, event_id="new")]), recall_config)
    wait_until(lambda: backlog(client) == 0)
    before = store.result("3", "new_item")
    late = make_event(minutes=30, event_id="late", item_id=before.item_ids[0] if before else None)
    feed(client, iter([late]), recall_config)
    wait_until(lambda: backlog(client) == 0)
    after = store.result("3", "new_item")
    assert before is not None and after is not None
    assert after.event_id == "new"
    assert late.item_id not in after.item_ids  # it is known now that the user has it


def test_a_backlog_costs_an_inference_a_user_not_an_event(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
) -> None:
    users = [f"user{number}" for number in range(10)]
    events = [make_event(user, minutes=step, event_id=f"{user}-{step}") for step in range(100) for user in users]
    feed(client, iter(events), recall_config)
    worker = start_worker()
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    read = worker.metrics.registry.get_sample_value
    wait_until(lambda: read("urm_worker_events_total", {"outcome": "done"}) == len(events))
    assert backlog(client) == 0
    wait_until(lambda: read("urm_worker_user_inferences_total") == len(users))
    store = UserStore(client, recall_config)
    for user in users:
        result = store.result(user, "next_purchase")
        assert result is not None and result.event_id == f"{user}-99"
        assert len(store.recent([user])[user].events) == 100


def test_a_user_who_never_pauses_gets_results_all_the_while(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    store = UserStore(client, recall_config)
    seen: set[str] = set()
    numbers = itertools.count()

    def one_more() -> bool:
        """Another event of the busy user and of another one, before the earlier ones can all be done."""
        for user in ("busy", f"other{next(numbers)}"):
            feed(client, iter([make_event(user, minutes=next(numbers))]), recall_config)
        result = store.result("busy", "next_purchase")
        if result is not None:
            seen.add(result.event_id)
        return len(seen) >= 5

    wait_until(one_more)


def test_a_crash_under_backlog_costs_an_inference_per_user_not_per_event(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
) -> None:
    users = [f"user{number}" for number in range(16)]
    events = [make_event(user, minutes=step, event_id=f"{user}-{step}") for step in range(20) for user in users]
    feed(client, iter(events), recall_config)
    for name in ("dead", "dead as well"):
        dead = EventStream(client, name, recall_config)
        dead.ensure_group()
        dead.read_ahead(dead.read(8, 10))
    time.sleep(recall_config.claim_idle_seconds)
    worker = start_worker()
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: backlog(client) == 0)
    read = worker.metrics.registry.get_sample_value
    wait_until(lambda: read("urm_worker_events_total", {"outcome": "done"}) == len(events))
    assert read("urm_worker_user_inferences_total") == len(users)


@pytest.mark.parametrize("key", [history_keys("4")[0], history_keys("4")[1], waiting_key("4")])
def test_one_users_broken_key_costs_nobody_else(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig, key: str
) -> None:
    client.set(key, "a key of another kind")
    for user in ("3", "4", "5"):
        client.xadd(STREAM, {"event": encode_event(make_event(user, event_id=f"of {user}"))})
    wait_until(lambda: backlog(client) == 0)
    reasons = [letter.reason for letter in list_letters(client)]
    assert ["WRONGTYPE" in reason for reason in reasons] == ([] if key == waiting_key("4") else [True])
    assert all(UserStore(client, recall_config).result(user, "next_purchase") for user in ("3", "5"))
    assert live_workers(client) == {"worker-a"}


def test_corrupt_release_is_rejected_and_the_old_one_goes_on(
    client: redis.Redis,
    releases: tuple[Release, Release],
    promoted: tuple[RecallWorker, Publication],
    recall_config: RecallConfig,
    broken_bundle: Path,
) -> None:
    (broken_bundle / "item_table" / "keys.npy").unlink()
    with pytest.raises(ReleaseError, match=r"a rejection by worker-a: .*item_table/keys\.npy.*no such file"):
        roll_out(WorkerFlip(client), releases[1].name, str(broken_bundle), timeout_seconds=60)
    serving, wanted = read_publication(client, SERVING), read_publication(client, WANTED)
    assert serving is not None and wanted is not None
    assert wanted.release == releases[0].name
    feed(client, iter([make_event()]), recall_config)
    wait_until(lambda: backlog(client) == 0)
    result = UserStore(client, recall_config).result("3", "next_purchase")
    assert result is not None and result.release == releases[0].name
    wait_until(lambda: read_publication(client, SERVING) == wanted)  # taken again under the new number


def test_switch_under_load_changes_the_release_of_later_results(
    client: redis.Redis,
    releases: tuple[Release, Release],
    promoted: tuple[RecallWorker, Publication],
    recall_config: RecallConfig,
) -> None:
    events = [make_event(str(n % NUM_USERS), minutes=n, event_id=f"e{n}") for n in range(200)]
    feed(client, iter(events[:100]), recall_config)
    roll_out(WorkerFlip(client), releases[1].name, str(releases[1].bundle), timeout_seconds=60)
    feed(client, iter(events[100:]), recall_config)
    wait_until(lambda: backlog(client) == 0)
    store = UserStore(client, recall_config)
    results = [store.result(str(user), "next_purchase") for user in range(NUM_USERS)]
    assert {result.release for result in results if result} == {releases[1].name}
    back = roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    assert back.order > promoted[1].order


def test_worker_outlives_redis_and_sigterm_drains_it(
    releases: tuple[Release, Release], recall_config: RecallConfig, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = RedisServer(tmp_path)
    request.addfinalizer(server.stop)
    server.start()
    settings = releases[0].settings.model_copy(update={"redis_url": server.url})
    with runtime_process(settings, "worker", *OPTIONS) as process:
        with redis.Redis.from_url(server.url, decode_responses=True, retry=None) as client:
            await_worker(client, process)
            roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=90)
            feed(client, iter([make_event(event_id="before")]), recall_config)
            wait_until(lambda: backlog(client) == 0)
        server.stop()
        time.sleep(0.5)
        server.start()
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            feed(client, iter([make_event(minutes=70, event_id="after")]), recall_config)
            wait_until(lambda: backlog(client) == 0)
            result = UserStore(client, recall_config).result("3", "next_purchase")
            assert result is not None and result.event_id == "after"
            recent = UserStore(client, recall_config).recent(["3"])["3"]
            assert [event.event_id for event in recent.events] == ["before", "after"]

            events = [make_event(f"user{number}", event_id=f"e{number}") for number in range(100)]
            feed(client, iter(events), recall_config)
            wait_until(lambda: backlog(client) < len(events))
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=30) == 0
            assert live_workers(client) == set()
            assert client.xpending(STREAM, "recall")["pending"] == 0  # what was read is finished
            store = UserStore(client, recall_config)
            done = sum(store.result(f"user{number}", "next_purchase") is not None for number in range(100))
            assert done + backlog(client) == 100  # the rest waits unread


def test_killed_worker_loses_no_event(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    recall_config: RecallConfig,
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown if the test fails
    chance = random.Random(seed)
    port = free_port()
    with runtime_process(releases[0].settings, "worker", "--metrics-port", str(port), *OPTIONS) as process:
        await_worker(client, process)
        roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=90)

        feed(client, iter([make_event("first")]), recall_config)
        wait_until(lambda: backlog(client) == 0)
        page = f"http://127.0.0.1:{port}/metrics"
        wait_until(lambda: 'urm_worker_events_total{outcome="done"} 1.0' in httpx.get(page).text)
        metrics = httpx.get(page).text
        assert "urm_event_to_visible_seconds_count 1.0" in metrics
        assert f'urm_worker_release{{kind="stream",release="{releases[0].name}"}} 1.0' in metrics
        for thread in psutil.Process(process.pid).threads():
            assert os.getpriority(os.PRIO_PROCESS, thread.id) == min(os.getpriority(os.PRIO_PROCESS, 0) + 10, 19)

        users = [f"user{number}" for number in range(80)]
        events = [
            make_event(user, 1000 + chance.randrange(60), minutes=step, event_id=f"{user}-{step}")
            for step in range(5)
            for user in users
        ]
        feed(client, iter(events), recall_config)
        wait_until(lambda: 0 < backlog(client) < len(events) - chance.randrange(50))
        process.kill()
        process.wait()
        assert backlog(client) > 0, "the worker was too fast to be killed at work"

    start_worker("worker-b")
    wait_until(lambda: backlog(client) == 0, seconds=60)
    store = UserStore(client, recall_config)
    assert list_letters(client) == []
    for user in users:
        result = store.result(user, "next_purchase")
        assert result is not None and result.event_id == f"{user}-4"
        assert len(store.recent([user])[user].events) == 5


def test_republished_release_is_taken_without_loading(
    client: redis.Redis, releases: tuple[Release, Release], promoted: tuple[RecallWorker, Publication]
) -> None:
    again = roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=5)
    assert again.order > promoted[1].order


@pytest.mark.parametrize("fault", ["read-only", "without replicas"])
def test_a_redis_that_refuses_writes_for_a_while_is_waited_for(
    releases: tuple[Release, Release], recall_config: RecallConfig, tmp_path: Path, fault: str
) -> None:
    """A fail-over leaves workers with a replica; they go on when their address takes writes again."""
    server = RedisServer(tmp_path)
    server.start()
    seen: list[type[BaseException]] = []

    class Watched(RecallWorker):
        def _sleep(self, seconds: float) -> None:
            seen.append(type(sys.exc_info()[1] or ValueError()))
            super()._sleep(min(seconds, 0.1))

    def load(publication: Publication) -> ServingRelease:
        return load_release(publication, releases[0].settings, releases[0].config.release)

    worker = Watched(open_redis(server.url), recall_config, load, "worker")
    thread = threading.Thread(target=worker.run)
    try:
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            thread.start()
            wait_until(lambda: live_workers(client))
            roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
            seen.clear()
            if fault == "read-only":
                client.replicaof("127.0.0.1", free_port())
            else:
                client.config_set("min-replicas-to-write", 1)
            wait_until(lambda: seen)
            assert thread.is_alive() and issubclass(seen[0], redis.RedisError)
            client.replicaof("no", "one")
            client.config_set("min-replicas-to-write", 0)
            feed(client, iter([make_event()]), recall_config)
            wait_until(lambda: backlog(client) == 0)
    finally:
        worker.stop()
        thread.join(timeout=30)
        server.stop()
    assert not thread.is_alive()


def test_a_redis_that_forgets_all_between_two_commands_ends_no_worker(
    client: redis.Redis,
    redis_server: RedisServer,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "_MAINTENANCE_SECONDS", 0)
    publication = Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1)
    settings, config = releases[0].settings, releases[0].config

    def load(wanted: Publication) -> ServingRelease:
        return load_release(wanted, settings, config.release)

    with ForgetfulRedis.from_url(redis_server.url, decode_responses=True) as forgetful:
        source = partial(FixedRelease, publication)
        worker = RecallWorker(forgetful, recall_config, load, "worker-a", source=source)

        def work_until(done: Callable[[], object]) -> None:
            def step() -> object:
                worker.step()
                return done()

            wait_until(step)

        work_until(lambda: read_publication(client, SERVING))
        for at in itertools.count(1):
            feed(client, iter([make_event(event_id=f"lost-{at}")]), recall_config)
            forgetful.commands, forgetful.forgets_at = 0, at
            worker.step()
            if forgetful.commands < at:
                break
            feed(client, iter([make_event(event_id=f"kept-{at}")]), recall_config)
            work_until(lambda: backlog(client) == 0)
            result = UserStore(client, recall_config).result("3", "next_purchase")
            assert result is not None and result.event_id == f"kept-{at}"
    assert at > 10
