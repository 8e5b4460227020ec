"""Several worker processes under a supervisor, with a real Redis; and the supervisor alone with simple programs."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.recall.operate.intake import feed
from components.recall.process.forks import Program
from components.recall.process.health import STALE_SECONDS, serve_health
from components.recall.process.supervisor import REDIS_TIMEOUT_SECONDS, InstanceState, State, Supervisor, share_cores
from components.recall.state.store import UserStore
from components.redis_client import open_redis
from components.release.publication import live_workers, name_worker, unregister
from tests.worlds import REPOSITORY
from tests.worlds.recall import Release, make_event, wait_until
from tests.worlds.servers import RedisServer, free_port


@contextmanager
def running(supervisor: Supervisor) -> Iterator[Supervisor]:
    thread = threading.Thread(target=supervisor.run)
    thread.start()
    try:
        yield supervisor
    finally:
        supervisor.stop()
        thread.join(timeout=30)
        assert not thread.is_alive()


def pids(supervisor: Supervisor) -> list[int | None]:
    return [instance.pid for instance in supervisor.state.instances]


def test_cores_are_shared_out_and_none_twice_before_all_are_used() -> None:
    every = sorted(os.sched_getaffinity(0))
    shares = share_cores(len(every), 1)
    assert set().union(*shares) == set(every)
    assert all(len(share) == 1 for share in shares)
    assert share_cores(1, len(every)) == [frozenset(every)]
    assert share_cores(2, 10 * len(every)) == [frozenset(every)] * 2


def test_instances_that_do_not_need_all_cores_take_none_for_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every supervisor of a machine would take the same ones."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert share_cores(3, 2) == [frozenset(range(8))] * 3
    assert share_cores(4, 2) == [frozenset({core, core + 1}) for core in (0, 2, 4, 6)]


def test_an_instance_that_ends_at_once_is_started_again_after_ever_longer_pauses(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.recall.process.supervisor.FIRST_PAUSE_SECONDS", 0.2)
    supervisor = Supervisor(lambda _: (sys.exit, (3,)), 1, 1, open_redis(redis_server.url), 60)
    supervisor._instances[0].pause = 0.2
    with running(supervisor):
        wait_until(lambda: supervisor._instances[0].starts >= 4)
    assert supervisor._instances[0].pause >= 8 * 0.2
    assert not supervisor.state.ready


def test_a_living_process_without_a_heartbeat_is_killed_unless_redis_is_silent_too(redis_server: RedisServer) -> None:
    sleeper: Program = (time.sleep, (600,))
    unreachable = redis.Redis(host="127.0.0.1", port=free_port(), decode_responses=True)
    with (
        running(Supervisor(lambda _: sleeper, 1, 1, open_redis(redis_server.url), 1)) as watched,
        running(Supervisor(lambda _: sleeper, 1, 1, unreachable, 1)) as blind,
    ):
        wait_until(lambda: pids(blind) and pids(blind)[0])
        first = pids(blind)
        wait_until(lambda: watched.state.instances and watched.state.instances[0].restarts == 1)
        assert pids(blind) == first
    assert not psutil.pid_exists(int(str(first[0])))


def test_a_redis_that_hangs_keeps_the_supervisor_neither_from_turning_nor_from_ending(tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    server.start()
    sleeper: Program = (time.sleep, (600,))
    client = open_redis(server.url, REDIS_TIMEOUT_SECONDS)
    oldest = 0.0
    try:
        with running(Supervisor(lambda _: sleeper, 1, 1, client, 60)) as supervisor:
            wait_until(lambda: pids(supervisor) and pids(supervisor)[0])
            server.pause()
            os.kill(int(str(pids(supervisor)[0])), signal.SIGKILL)
            while supervisor.state.instances[0].restarts == 0:
                oldest = max(oldest, time.monotonic() - supervisor.state.turned_at)
                time.sleep(0.02)
            stopped_at = time.monotonic()
        assert oldest < STALE_SECONDS
        assert time.monotonic() - stopped_at < STALE_SECONDS
    finally:
        server.resume()
        server.stop()


def test_an_instance_ends_when_its_supervisor_was_killed() -> None:
    script = (
        "import os, time; from components.recall.process.forks import start; "
        "print(start((time.sleep, (600,)), frozenset(os.sched_getaffinity(0)), 'instance').pid, flush=True); "
        "time.sleep(600)"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    with supervisor:
        pid = int(supervisor.stdout.readline())
        assert psutil.pid_exists(pid)
        supervisor.kill()
    wait_until(lambda: not psutil.pid_exists(pid))


def test_health_is_that_of_the_loop_and_readiness_that_of_a_release() -> None:
    state = State(instances=(InstanceState(0, 1, "", 2),))
    port = free_port()
    server = serve_health(lambda: state, "127.0.0.1", port)
    try:
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503
        assert 'urm_instance_restarts_total{instance="0"} 2.0' in httpx.get(f"http://127.0.0.1:{port}/metrics").text
        state = State(instances=(InstanceState(0, 1, "urm-1", 2),))
        assert httpx.get(f"http://127.0.0.1:{port}/readyz").json()["instances"][0]["release"] == "urm-1"
        state = State(turned_at=state.turned_at - 60, instances=state.instances)
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 503
        assert httpx.get(f"http://127.0.0.1:{port}/else").status_code == 404
    finally:
        server.shutdown()
        server.server_close()


def test_ad_hoc_instances_have_the_last_numbers_and_do_not_make_the_container_ready(redis_server: RedisServer) -> None:
    asked: list[int] = []

    def program(number: int) -> Program:
        asked.append(number)
        return time.sleep, (600,)

    with running(Supervisor(program, 2, 1, open_redis(redis_server.url), 60, ad_hoc=1)) as supervisor:
        wait_until(lambda: len(supervisor.state.instances) == 3 and all(pids(supervisor)))
    assert asked == [0, 1, 2]
    assert [instance.ad_hoc for instance in supervisor.state.instances] == [False, False, True]
    assert not State(instances=(InstanceState(0, 1, "", 0), InstanceState(1, 2, "urm-1", 0, ad_hoc=True))).ready


@pytest.fixture
def container(
    redis_server: RedisServer, releases: tuple[Release, Release]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`urm recall workers` with two instances, as an operator starts it, and its address."""
    port = free_port()
    options = [
        part
        for value in ("max_wait_ms=5", "batch_size=4", "k=10", "claim_idle_seconds=0.5")
        for part in ("--set", f"recall.{value}")
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "components", "recall", "workers", "--instances", "2", "--port", str(port), *options],
        cwd=REPOSITORY,
        env={
            "PATH": "/usr/bin:/bin",
            "URM_HOME": str(releases[0].settings.home),
            "URM_REDIS_URL": redis_server.url,
            "URM_DEVICE": "cpu",
            "URM_NUM_THREADS": "1",
        },
    )
    yield process, f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


def test_two_instances_serve_and_survive_the_death_of_one(
    container: tuple[subprocess.Popen[bytes], str],
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown if the test fails
    process, url = container
    wait_until(lambda: len(live_workers(client)) == 2, seconds=120)
    assert httpx.get(f"{url}/readyz").status_code == 503  # no release yet
    roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=90)
    wait_until(lambda: httpx.get(f"{url}/readyz").status_code == 200)

    instances = httpx.get(f"{url}/readyz").json()["instances"]
    children = {instance["pid"]: instance["restarts"] for instance in instances}
    assert len(children) == 2
    assert len({psutil.Process(pid).ppid() for pid in children} - {process.pid}) == 1  # both forked from one process
    cores = [frozenset(psutil.Process(pid).cpu_affinity()) for pid in sorted(children)]
    assert set(cores) == set(share_cores(2, 1))

    users = [f"user{number}" for number in range(60)]
    feed(client, iter([make_event(user, event_id=user) for user in users]), recall_config)
    victim = random.Random(seed).choice(sorted(children))
    name = name_worker(victim)
    os.kill(victim, signal.SIGKILL)
    unregister(client, name)  # instead of waiting until its heartbeat expires
    store = UserStore(client, recall_config)
    wait_until(lambda: all(store.result(user, "next_purchase") is not None for user in users), seconds=60)
    place = list(children).index(victim)
    wait_until(lambda: httpx.get(f"{url}/readyz").json()["instances"][place]["restarts"] == children[victim] + 1)
    wait_until(lambda: len(live_workers(client)) == 2, seconds=120)

    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert live_workers(client) == set()
    assert not any(psutil.pid_exists(pid) for pid in children)
