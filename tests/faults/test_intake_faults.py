"""Events that come twice, late, in any order, too many, or broken; and clocks that jump."""

import random
from collections.abc import Callable

import psutil
import pytest
import redis

from components.recall.operate.deadletters import list_letters
from components.recall.serving.answers import answer_users
from components.recall.serving.engine import load_release
from components.recall.state.events import decode_event
from components.recall.state.scripts import STREAM
from components.recall.state.store import UserStore
from components.release.publication import Publication
from tests.faults.checker import ALWAYS_ANSWERED
from tests.faults.injection import Fault
from tests.faults.world import Worker, World
from tests.worlds.recall import POISON_ITEM, Release, make_event, wait_until

YEAR = 365 * 86_400.0


def waiting(client: redis.Redis) -> list[str]:
    return [decode_event(fields["event"]).event_id for _, fields in client.xrange(STREAM)]


def not_finished(world: World, worker: Worker) -> bool:
    """Whether the worker dies before all is done."""
    wait_until(lambda: world.checker.settled() or worker.status == psutil.STATUS_ZOMBIE, seconds=90)
    died = worker.status == psutil.STATUS_ZOMBIE
    if died:
        world.bury(worker)
    return died


def test_full_stream_refuses_aloud_trims_nothing_and_recovers(make_world: Callable[..., World], seed: int) -> None:
    world = make_world(max_stream_length=50)
    users = [f"user{number}" for number in range(10)]
    events = world.make_events(users, 50, random.Random(seed))
    world.send(events)
    answer = world.http.post("/v1/events", json=make_event("late comer").model_dump(mode="json"))
    assert answer.status_code == 429
    assert int(answer.headers["Retry-After"]) > 0
    assert waiting(world.client) == [event.event_id for event in events]
    with world.reading(users, seed), world.sending(users, seed):  # a patient client repeats what is refused
        world.start_worker()
        wait_until(lambda: len(world.checker.accepted_ids) > 100, seconds=90)
    report = world.settle()
    assert report.violations == []
    assert report.dead == 0


def test_order_and_repeats_do_not_matter_to_the_result(make_world: Callable[..., World], seed: int) -> None:
    """Two users nobody knows do the same: one tells it in order and once, the other in disorder, part of it twice."""
    chance, world = random.Random(seed), make_world()
    told = world.make_events(["orderly"], 30, chance)
    told.sort(key=lambda event: event.ts)
    twins = [event.model_copy(update={"user_id": "messy", "event_id": f"twin-{event.event_id}"}) for event in told]
    muddle = chance.sample(twins + chance.choices(twins, k=20), 50)
    world.start_worker()
    world.start_worker()
    with world.reading(["orderly", "messy"], seed):
        for step in range(10):
            world.send(told[3 * step : 3 * step + 3])
            world.send(muddle[5 * step : 5 * step + 5])
    report = world.settle()
    assert report.violations == []
    assert (report.accepted, report.dead) == (60, 0)
    store = UserStore(world.client, world.release.config.recall)
    for task in ALWAYS_ANSWERED:
        orderly, messy = store.result("orderly", task), store.result("messy", task)
        assert orderly is not None and messy is not None
        assert orderly.scores == pytest.approx(messy.scores, abs=1e-3)
        assert orderly.event_ts == messy.event_ts == told[-1].ts


@pytest.mark.parametrize("kills", [False, True])
def test_poison_event_is_given_up_with_its_reason_and_harms_no_other_user(
    make_world: Callable[..., World], seed: int, kills: bool
) -> None:
    world = make_world(max_deliveries=2, claim_idle_seconds=0.5)
    users = [f"user{number}" for number in range(6)]
    poison = make_event("poisoned", POISON_ITEM, minutes=5000, event_id="poison")
    events = world.make_events(users, 40, random.Random(seed))
    fault = Fault(poison_item=POISON_ITEM, poison_kills=kills)
    # The poison is the newest event of its own user alone; elsewhere the item would be poison, too.
    events = [event.model_copy(update={"item_id": 1050}) if event.item_id == POISON_ITEM else event for event in events]
    world.send([poison, *events])
    deaths = 0
    with world.reading(users, seed):
        while not_finished(world, world.start_worker(fault, wait=False)):
            deaths += 1
    report = world.settle()
    (letter,) = list_letters(world.client)
    assert decode_event(letter.event) == poison
    assert letter.reason.startswith("delivered too often" if kills else "ValueError: index out of range")
    assert deaths == (2 if kills else 0)
    assert (report.accepted, report.visible, report.dead) == (41, 40, 1)
    assert report.violations == []


def test_worker_whose_clock_jumps_gives_the_same_results(
    make_world: Callable[..., World], releases: tuple[Release, Release], seed: int
) -> None:
    """A user's "now" is the newest event's, so ages do not depend on the worker's clock."""
    world = make_world()
    users = [str(number) for number in range(6)]  # known to the feature store
    for offsets in ((0.0, YEAR, -YEAR), (-20 * YEAR, 3600.0)):
        world.start_worker(Fault(clock_offsets=offsets))
    events = world.make_events(users, 60, random.Random(seed))
    with world.reading(users, seed):
        for start in range(0, len(events), 6):
            world.send(events[start : start + 6])
    report = world.settle()
    assert report.violations == []
    assert (report.accepted, report.dead) == (60, 0)
    publication = Publication(release=releases[0].name, bundle=str(releases[0].bundle), order=1)
    release = load_release(publication, releases[0].settings, releases[0].config.release)
    store = UserStore(world.client, releases[0].config.recall)
    expected = answer_users(release, release.read_histories(users), store.recent(users), 10)
    for user in users:
        for task in ALWAYS_ANSWERED:
            result = store.result(user, task)
            assert result is not None
            assert result.scores == pytest.approx(expected[user][task].scores, abs=1e-3)


def test_api_whose_clock_jumps_refuses_what_seems_to_come_from_the_future_and_loses_nothing(
    make_world: Callable[..., World], seed: int
) -> None:
    world = make_world(api_fault=Fault(clock_offsets=(0.0, YEAR, -20 * YEAR)))
    users = [f"user{number}" for number in range(6)]
    world.start_worker()
    with world.reading(users, seed), world.sending(users, seed):
        wait_until(lambda: world.checker.num_refused > 30 and len(world.checker.accepted_ids) > 30, seconds=90)
    report = world.settle()
    assert (report.dead, report.unknown) == (0, 0)
    assert report.violations == []
