"""A Redis that dies and comes back, one that forgets its newest writes, one that does not answer for a while."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from components.recall.state.scripts import accepted_key
from tests.faults.injection import Fault
from tests.faults.world import World
from tests.worlds.recall import make_event, wait_until
from tests.worlds.servers import RedisServer

PAUSE_SECONDS = float(os.environ.get("URM_FAULT_PAUSE_SECONDS", "4"))
EVERYSEC_WINDOW_SECONDS = 3.0  # Redis postpones a write by at most two seconds, and counts in whole ones
USERS = [str(number) for number in range(8)]


@pytest.fixture
def make_server(tmp_path: Path) -> Iterator[Callable[[str], RedisServer]]:
    servers: list[RedisServer] = []

    def make(appendfsync: str) -> RedisServer:
        servers.append(RedisServer(tmp_path, appendfsync))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.resume()
        server.stop()


def wait_for_events(world: World, more: int) -> None:
    """Return when so many more have been accepted."""
    before = len(world.checker.accepted_ids)
    wait_until(lambda: len(world.checker.accepted_ids) >= before + more, seconds=90)


def test_redis_killed_with_fsync_always_loses_nothing(
    make_world: Callable[..., World], make_server: Callable[[str], RedisServer], seed: int
) -> None:
    chance, server = random.Random(seed), make_server("always")
    world = make_world(server)
    world.start_worker()
    world.start_worker()
    with world.reading(USERS, seed), world.sending(USERS, seed):
        wait_for_events(world, 30)
        time.sleep(chance.uniform(0, 0.5))
        server.stop()
        time.sleep(chance.uniform(0, 0.5))
        server.start()
        wait_for_events(world, 30)
    report = world.settle()
    assert world.lost() == []
    assert report.violations == []
    assert report.dead == 0


@pytest.mark.parametrize("power_cut", [False, True])
def test_redis_killed_with_fsync_everysec_loses_at_most_its_newest_events(
    make_world: Callable[..., World], make_server: Callable[[str], RedisServer], seed: int, power_cut: bool
) -> None:
    """A killed process leaves what it has written to the kernel; a power cut (a log cut short) does not."""
    chance, server = random.Random(seed), make_server("everysec")
    world = make_world(server)
    world.start_worker()
    world.start_worker()
    log = server.append_only_file
    with world.reading(USERS, seed), world.sending(USERS, seed):
        wait_for_events(world, 30)
        kept, synced = set(world.checker.accepted_ids), log.stat().st_size
        cut_from = time.monotonic()
        wait_for_events(world, 30)
        time.sleep(0 if power_cut else max(0, EVERYSEC_WINDOW_SECONDS - (time.monotonic() - cut_from)))
        server.stop()
        time.sleep(0.5)  # for what was answered just before
        if power_cut:
            os.truncate(log, chance.randint(synced, log.stat().st_size))
        world.checker.note_amnesia()
        server.start()
        wait_for_events(world, 30)
    order, lost = world.checker.accepted_ids, world.lost()
    print("lost", len(lost), "of", len(order))
    assert not kept & set(lost)
    assert lost == order[order.index(lost[0]) :][: len(lost)] if lost else True  # the newest at that time, no others
    world.checker.note_lost(lost)
    report = world.settle()
    assert report.violations == []
    assert report.dead == 0


def test_an_event_that_redis_still_has_is_not_lost_with_what_a_worker_remembered_of_it(
    make_world: Callable[..., World], make_server: Callable[[str], RedisServer]
) -> None:
    """The worker is in the middle of its inference when Redis comes back without the history, but with the event."""
    server = make_server("everysec")
    world = make_world(server)
    first = world.start_worker()
    world.send([make_event("1", minutes=1, event_id="warm")])
    wait_until(world.checker.settled)
    world.kill(first)
    world.send([make_event("2", minutes=2, event_id="victim")])
    time.sleep(1.5)  # the event is on disk
    log = server.append_only_file
    size = log.stat().st_size
    slow = world.start_worker(Fault(point="infer", signal=signal.SIGSTOP))
    wait_until(lambda: slow.status == psutil.STATUS_STOPPED)
    server.stop()
    os.truncate(log, size)
    world.checker.note_amnesia()
    server.start()
    os.kill(slow.pid, signal.SIGCONT)
    report = world.settle()
    assert world.lost() == []
    assert report.violations == []


def test_redis_paused_delays_and_loses_nothing(
    make_world: Callable[..., World], make_server: Callable[[str], RedisServer], seed: int
) -> None:
    server = make_server("everysec")
    world = make_world(server)
    world.start_worker()
    world.start_worker()
    with world.reading(USERS, seed), world.sending(USERS, seed):
        wait_for_events(world, 30)
        server.pause()
        time.sleep(PAUSE_SECONDS)
        server.resume()
        wait_for_events(world, 30)
    report = world.settle()
    assert report.violations == []
    assert report.dead == 0
    first = world.checker.accepted[0]
    assert world.client.exists(accepted_key(first.user_id, first.event_id))
