import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

import pytest
import redis

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.recall.operate.deadletters import list_letters, replay
from components.recall.operate.intake import feed
from components.recall.serving.context import KnownHistory
from components.recall.serving.engine import ServingRelease, load_release
from components.recall.state.scripts import CONTROL, DEAD_STREAM, GROUP, STREAM, accepted_key
from components.recall.state.store import UserStore
from components.recall.state.stream import Entry, EventStream
from components.recall.worker.loop import SickWorkerError
from components.recall.worker.stream import RecallWorker
from components.redis_client import open_redis
from components.release.publication import Publication, live_workers
from tests.worlds.recall import (
    POISON_ITEM,
    Loader,
    Release,
    StartWorker,
    add_history,
    backlog,
    make_event,
    wait_until,
)
from tests.worlds.tiny import NUM_USERS


def test_poison_event_ends_as_a_dead_letter_and_harms_nobody_else(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    load_poisoned: Loader,
    recall_config: RecallConfig,
) -> None:
    poison = make_event("5", POISON_ITEM, minutes=50, event_id="poison")
    good = [make_event(str(user), minutes=40, event_id=f"good{user}") for user in range(NUM_USERS)]
    feed(client, iter([poison, *good]), recall_config)
    start_worker(load=load_poisoned)
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    wait_until(lambda: list_letters(client))
    wait_until(lambda: backlog(client) == 0)
    (letter,) = list_letters(client)
    assert "poison" in letter.event
    assert letter.reason == "ValueError: index out of range in self"
    assert letter.deliveries == recall_config.max_deliveries
    store = UserStore(client, recall_config)
    for user in range(NUM_USERS):
        result = store.result(str(user), "next_purchase")
        assert result is not None and result.event_id == f"good{user}"

    assert replay(client, [], recall_config) == 1
    wait_until(lambda: list_letters(client))  # the fault is not fixed
    assert backlog(client) == 0


def test_good_events_of_a_user_do_not_suffer_from_a_poison_event_among_them(
    client: redis.Redis,
    releases: tuple[Release, Release],
    load_poisoned: Loader,
    recall_config: RecallConfig,
) -> None:
    """The poison is found by halving, and never comes into the history."""
    stream = EventStream(client, "worker", recall_config)
    stream.ensure_group()
    good = [make_event("5", minutes=minute, event_id=f"good{minute}") for minute in range(1, 16)]
    poison = make_event("5", POISON_ITEM, minutes=70, event_id="poison")
    feed(client, iter([*good[:7], poison, *good[7:]]), recall_config)
    worker = RecallWorker(client, recall_config, load_poisoned, "worker")
    release = load_poisoned(Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1))
    worker._process(release, stream.read(20, 10))
    assert [entry_id for entry_id, _ in client.xrange(STREAM)] == [client.hget(accepted_key("5", "poison"), "entry")]
    history = UserStore(client, recall_config).recent(["5"])["5"]
    assert history.events == good
    read = worker.metrics.registry.get_sample_value
    assert read("urm_worker_user_inferences_total") <= 5  # of 15 good events, of which one stands alone with the poison
    for tries in range(2, recall_config.max_deliveries + 1):
        time.sleep(recall_config.claim_idle_seconds)
        (entry,) = stream.claim_stale(10)
        assert entry.deliveries == tries
        worker._retry(release, [entry])
    assert stream.counts() == (0, 0, 1)
    assert UserStore(client, recall_config).recent(["5"])["5"] == history


def test_an_event_given_up_while_its_worker_stood_still_stays_out_of_the_history(
    client: redis.Redis, releases: tuple[Release, Release], load_poisoned: Loader, recall_config: RecallConfig
) -> None:
    slow, other = EventStream(client, "slow", recall_config), EventStream(client, "other", recall_config)
    slow.ensure_group()
    given_up, bystander = make_event("5", minutes=70, event_id="given up"), make_event("4", event_id="by")
    feed(client, iter([given_up, bystander]), recall_config)
    entries = slow.read(10, 10)
    assert other.give_up(entries[0], "why")

    worker = RecallWorker(client, recall_config, load_poisoned, "slow")
    release = load_poisoned(Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1))
    worker._process(release, entries)
    assert "done" not in client.hgetall(accepted_key("5", "given up"))
    feed(client, iter([make_event("5", event_id="good")]), recall_config)
    worker._process(release, slow.read(10, 10))
    store = UserStore(client, recall_config)
    for user, event_id in (("4", "by"), ("5", "good")):
        result = store.result(user, "next_purchase")
        assert result is not None and result.event_id == event_id
        assert [event.event_id for event in store.recent([user])[user].events] == [event_id]
    read = worker.metrics.registry.get_sample_value
    assert read("urm_worker_events_total", {"outcome": "done"}) == 2
    assert read("urm_worker_events_total", {"outcome": "failed"}) == 0


def test_events_that_kill_their_worker_cost_no_other_event_of_their_user(
    client: redis.Redis, releases: tuple[Release, Release], load_poisoned: Loader, recall_config: RecallConfig
) -> None:
    """At its last try an entry goes alone; so a killer uses up the tries of nobody else."""
    config = recall_config.model_copy(update={"claim_idle_seconds": 0.01})
    stream = EventStream(client, "worker", config)
    stream.ensure_group()
    feed(client, iter([make_event("5", minutes=n, event_id=f"e{n}") for n in range(3)]), config)
    stream.read(10, 10)
    worker = RecallWorker(client, config, load_poisoned, "worker")
    release = load_poisoned(Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1))

    class Killed(BaseException):
        """As of a process that dies in native code."""

    def die(_: ServingRelease, entries: list[Entry]) -> None:
        if any(entry.event.event_id == "e1" for entry in entries):
            raise Killed
        RecallWorker._infer_and_commit(worker, release, entries)

    worker._infer_and_commit = die  # type: ignore[method-assign]  # the fault
    while stream.counts()[0]:
        time.sleep(0.02)
        with suppress(Killed):
            worker._retry(release, stream.claim_stale(10))
    (letter,) = list_letters(client)
    assert '"e1"' in letter.event and letter.reason.startswith("delivered too often")
    assert [event.event_id for event in UserStore(client, config).recent(["5"])["5"].events] == ["e0", "e2"]


class SickRelease(ServingRelease):
    """Cannot read the feature store, as on a machine whose disk is gone."""

    def read_histories(self, user_ids: list[str]) -> dict[str, KnownHistory]:
        raise OSError("feature store: input/output error")


@pytest.fixture
def load_sick(releases: tuple[Release, Release]) -> Loader:
    def load(publication: Publication) -> ServingRelease:
        return SickRelease(**vars(load_release(publication, releases[0].settings, releases[0].config.release)))

    return load


def test_a_sick_worker_beside_a_healthy_one_dead_letters_nothing_and_leaves(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    load_sick: Loader,
    recall_config: RecallConfig,
) -> None:
    start_worker("well")
    start_worker("sick", load=load_sick)
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
    for number in range(100):
        feed(client, iter([make_event(f"user{number}", event_id=f"e{number}")]), recall_config)
        time.sleep(0.01)  # so that both find work
    wait_until(lambda: live_workers(client) == {"well"})
    wait_until(lambda: backlog(client) == 0)
    assert list_letters(client) == []


def test_if_all_workers_are_sick_everything_waits_with_all_of_its_tries(
    client: redis.Redis,
    releases: tuple[Release, Release],
    start_worker: StartWorker,
    load_sick: Loader,
    recall_config: RecallConfig,
) -> None:
    feed(client, iter([make_event(f"user{number}", event_id=f"e{number}") for number in range(20)]), recall_config)
    for number in range(recall_config.max_deliveries + 1):  # as a supervisor starts one after the other
        start_worker(f"sick{number}", load=load_sick)
        if number == 0:
            WorkerFlip(client).publish(releases[0].name, str(releases[0].bundle))
        wait_until(lambda: not live_workers(client), 60)
    assert backlog(client) == 20 and list_letters(client) == []
    start_worker("well")
    wait_until(lambda: backlog(client) == 0)
    assert list_letters(client) == []


def test_a_worker_that_fails_with_a_user_who_succeeded_elsewhere_is_sick(
    client: redis.Redis,
    releases: tuple[Release, Release],
    load_poisoned: Loader,
    recall_config: RecallConfig,
) -> None:
    """It can answer for a user it made up, but for none that the feature store knows."""
    add_history(client, recall_config, [make_event("4")])
    client.set(CONTROL, "4")

    class HalfSick(ServingRelease):
        def read_histories(self, user_ids: list[str]) -> dict[str, KnownHistory]:
            if {"3", "4"} & set(user_ids):
                raise ValueError("row of another version")
            return super().read_histories(user_ids)

    release = load_poisoned(Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1))
    worker = RecallWorker(client, recall_config, load_poisoned, "worker")
    stream = EventStream(client, "worker", recall_config)
    stream.ensure_group()
    feed(client, iter([make_event("3")]), recall_config)
    entries = stream.read(10, 10)
    with pytest.raises(SickWorkerError, match="the probe failed after another failure: ValueError"):
        worker._process(HalfSick(**vars(release)), entries)
    client.delete(CONTROL)
    worker._process(HalfSick(**vars(release)), entries)  # nothing tells it from a poison event
    assert worker.metrics.registry.get_sample_value("urm_worker_events_total", {"outcome": "failed"}) == 1


@pytest.mark.parametrize("error", [redis.ConnectionError("the feature store's"), redis.exceptions.OutOfMemoryError()])
def test_what_is_waited_for_counts_against_no_event(
    client: redis.Redis, releases: tuple[Release, Release], error: redis.RedisError
) -> None:
    config = RecallConfig(k=10, max_deliveries=2, claim_idle_seconds=0.1)
    failures = iter(range(2 * config.max_deliveries))

    class Away(ServingRelease):
        def read_histories(self, users: Sequence[str]) -> dict[str, KnownHistory]:
            if next(failures, None) is not None:
                raise error
            return super().read_histories(users)

    def load(publication: Publication) -> ServingRelease:
        return Away(**vars(load_release(publication, releases[0].settings, releases[0].config.release)))

    class Hasty(RecallWorker):
        def _sleep(self, seconds: float) -> None:
            super()._sleep(min(seconds, 0.05))

    # With connections of its own, which it closes.
    worker = Hasty(open_redis(releases[0].settings.redis_url), config, load, "worker")
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_until(lambda: live_workers(client))
        roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
        feed(client, iter([make_event()]), config)
        wait_until(lambda: backlog(client) == 0)
    finally:
        worker.stop()
        thread.join(timeout=30)
    assert client.xlen(DEAD_STREAM) == 0
    assert next(failures, None) is None
    assert UserStore(client, config).result("3", "new_item") is not None


def test_an_outage_between_batches_takes_nothing_back_from_other_workers(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a worker had in hand before may be another one's work by now."""

    def lose(_: int) -> NoReturn:
        raise redis.ConnectionError

    release = load_release(
        Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1),
        releases[0].settings,
        releases[0].config.release,
    )
    worker = RecallWorker(client, recall_config, lambda _: release, "worker")
    monkeypatch.setattr(worker._source, "serving", release)
    feed(client, iter([make_event()]), recall_config)
    other = EventStream(client, "other", recall_config)
    other.ensure_group()
    monkeypatch.setattr(worker, "_in_hand", other.read(1, 1))
    monkeypatch.setattr(worker._stream, "claim_stale", lose)
    with pytest.raises(redis.ConnectionError):
        worker.step()
    (pending,) = client.xpending_range(STREAM, GROUP, "-", "+", 10)
    assert (pending["consumer"], pending["times_delivered"]) == ("other", 1)
