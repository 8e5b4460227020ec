"""Workers that die at any instant, that stand still and come back, that are told to go, that change the release."""

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.release.publication import WORKER_PREFIX
from tests.faults.injection import Fault
from tests.faults.rounds import run_rounds
from tests.faults.world import World
from tests.worlds.recall import POISON_ITEM, Release, make_event, wait_until

ROUNDS = int(os.environ.get("URM_FAULT_ROUNDS", "12"))
USERS = [str(number) for number in range(8)]


@pytest.mark.timeout(120 + 10 * ROUNDS)
def test_kill_at_random_points_loses_nothing_and_turns_nothing_back(
    make_world: Callable[..., World], seed: int
) -> None:
    tally = run_rounds(make_world(), ROUNDS, seed)
    print(tally)
    assert tally.report.violations == []
    assert tally.report.accepted == tally.events
    assert tally.redeliveries > 0
    assert tally.report.reads > 0


@pytest.mark.parametrize("point", ["recent", "infer", "commit"])
def test_two_workers_at_one_entry_leave_the_newer_result(
    make_world: Callable[..., World], seed: int, point: str
) -> None:
    """One stands still in the middle of a batch and comes back when another has done its work and more."""
    world = make_world()
    slow = world.start_worker(Fault(point=point, signal=signal.SIGSTOP))
    first = [make_event(user, minutes=10, event_id=f"first-{user}") for user in USERS[:4]]
    with world.reading(USERS[:4], seed):
        world.send(first)
        wait_until(lambda: slow.status == psutil.STATUS_STOPPED)
        world.start_worker()
        world.send([make_event(user, 1051, minutes=5, event_id=f"late-{user}") for user in USERS[:4:2]])
        world.send([make_event(user, 1052, minutes=20, event_id=f"second-{user}") for user in USERS[1:4:2]])
        wait_until(world.checker.settled)  # the other has claimed what the slow one has
        before = world.settle()
        world.client.delete(WORKER_PREFIX + slow.name)
        os.kill(slow.pid, signal.SIGCONT)
        wait_until(lambda: world.client.exists(WORKER_PREFIX + slow.name))  # it has finished its batch
    after = world.settle()
    assert before.violations == after.violations == []
    assert (after.accepted, after.visible, after.dead) == (8, 8, 0)


@pytest.mark.parametrize("point", ["read", "recent"])
def test_event_given_up_while_a_worker_stood_still_stays_dead_when_it_comes_back(
    make_world: Callable[..., World], seed: int, point: str
) -> None:
    """The worker finds the event gone when it first takes it into the history, or when it tries each user alone."""
    world = make_world(max_deliveries=2, claim_idle_seconds=0.5)
    poison = make_event("poisoned", POISON_ITEM, minutes=50, event_id="poison")
    others = [make_event(user, minutes=10, event_id=f"other-{user}") for user in USERS[:3]]
    slow = world.start_worker(Fault(point=point, signal=signal.SIGSTOP, poison_item=POISON_ITEM))
    with world.reading(["poisoned", *USERS[:3]], seed):
        world.send([poison, *others])
        wait_until(lambda: slow.status == psutil.STATUS_STOPPED)
        world.start_worker(Fault(poison_item=POISON_ITEM))
        before = world.settle()
        os.kill(slow.pid, signal.SIGTERM)  # it finishes its batch and goes
        os.kill(slow.pid, signal.SIGCONT)
        assert world.wait(slow.pid) == 0
        world.send([make_event("poisoned", minutes=minutes, event_id=f"late-{minutes}") for minutes in (20, 30)])
        after = world.settle()
    assert before.violations == after.violations == []
    assert (before.accepted, before.visible, before.dead) == (4, 3, 1)
    assert (after.accepted, after.visible, after.dead) == (6, 5, 1)


def test_sigterm_under_load_drains_and_loses_nothing(make_world: Callable[..., World], seed: int) -> None:
    world = make_world()
    leaving, staying = world.start_worker(), world.start_worker()
    with world.reading(USERS, seed), world.sending(USERS, seed):
        wait_until(lambda: len(world.checker.accepted_ids) > 50, seconds=90)
        os.kill(leaving.pid, signal.SIGTERM)
        assert world.wait(leaving.pid) == 0
        assert not world.client.exists(WORKER_PREFIX + leaving.name)
        assert world.count_pending(leaving) == 0
        accepted = len(world.checker.accepted_ids)
        wait_until(lambda: len(world.checker.accepted_ids) > accepted + 20, seconds=90)
    report = world.settle()
    assert staying.status != psutil.STATUS_ZOMBIE
    assert report.violations == []
    assert report.dead == 0


def test_release_switch_under_load_loses_nothing_and_turns_nothing_back(
    make_world: Callable[..., World], releases: tuple[Release, Release], seed: int
) -> None:
    world = make_world()
    world.start_worker()
    world.start_worker()
    with world.reading(USERS, seed), world.sending(USERS, seed):
        for release in (releases[1], releases[0], releases[1]):
            roll_out(WorkerFlip(world.client), release.name, str(release.bundle), timeout_seconds=90)
            accepted = len(world.checker.accepted_ids)
            wait_until(lambda start=accepted: len(world.checker.accepted_ids) > start + 20, seconds=90)
    report = world.settle()
    assert report.violations == []
    assert report.dead == 0
    world.send([make_event(user, minutes=5000, event_id=f"last-{user}") for user in USERS])
    assert world.settle().violations == []
    for user in USERS:
        answer = world.http.get(f"/v1/users/{user}/recall", params={"task": "next_purchase"}).json()
        assert (answer["release"], answer["event_id"]) == (releases[1].name, f"last-{user}")
