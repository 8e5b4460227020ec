"""Several worker processes under a supervisor, with a real Redis; and the supervisor alone with simple programs."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest
import redis

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import RelayedError, ReleaseError
from components.recall.operate.intake import feed
from components.recall.process.forks import Program
from components.recall.process.health import STALE_SECONDS, serve_health
from components.recall.process.supervisor import REDIS_TIMEOUT_SECONDS, InstanceState, State, Supervisor, share_cores
from components.recall.state.store import UserStore
from components.redis_client import open_redis
from components.release.publication import (
    SERVING,
    Publication,
    live_workers,
    name_worker,
    read_publication,
    unregister,
)
from tests.worlds import REPOSITORY, run_python
from tests.worlds.recall import Release, Store, make_event, runtime_environment, store_release, wait_until
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
        "print(start((time.sleep, (600,)), frozenset(os.sched_getaffinity(0)), 'instance')[0].pid, flush=True); "
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
    ad_hoc = InstanceState(1, 2, "urm-1", 0, ad_hoc=True)
    assert not State(instances=(InstanceState(0, 1, "", 0), ad_hoc)).ready
    assert State(instances=(ad_hoc,)).ready  # there is no other


def end_with(sentence: str) -> None:
    """End as `urm` does after a mistake in the input."""
    raise SystemExit(2) from ReleaseError(sentence, expected="one that loads", got="none", remedy="go back")


@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ((end_with, ("release a",)), "^release a: expected one that loads, got none; go back.$"),
        ((sys.exit, (2,)), "^instance 1 ended with exit code 2$"),
    ],
)
def test_in_a_pod_a_mistake_in_the_input_ends_all_with_its_sentence(
    redis_server: RedisServer, program: Program, sentence: str
) -> None:
    sleeper: Program = (time.sleep, (600,))
    programs = [sleeper, program]
    supervisor = Supervisor(lambda n: programs[n], 2, 1, open_redis(redis_server.url), 60, ends_with_instance=True)
    with pytest.raises(RelayedError, match=sentence) as caught:
        supervisor.run()
    assert caught.value.exit_code == 2
    assert [one.process and one.process.exitcode for one in supervisor._instances] == [-signal.SIGTERM, 2]


StartContainer = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.fixture
def start_container(redis_server: RedisServer, releases: tuple[Release, Release]) -> Iterator[StartContainer]:
    """Start `urm recall` as an operator does; gives the process and the address of its health."""
    processes = []
    values = ("max_wait_ms=5", "batch_size=4", "k=10", "claim_idle_seconds=0.5")
    options = [part for value in values for part in ("--set", f"recall.{value}")]

    def start(
        *arguments: str, environment: dict[str, str] | None = None, **pipes: int
    ) -> tuple[subprocess.Popen[str], str]:
        port = free_port()
        place = ["--port", str(port)] if arguments[0] == "workers" else []
        process = subprocess.Popen(
            [sys.executable, "-m", "components", "recall", *arguments, *place, *options],
            cwd=REPOSITORY,
            env=runtime_environment(releases[0].settings) | (environment or {}),
            text=True,
            **pipes,
        )
        processes.append(process)
        return process, f"http://127.0.0.1:{port}"

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_pod_serves_what_its_init_container_fetched(
    start_container: StartContainer, client: redis.Redis, releases: tuple[Release, Release], tmp_path: Path
) -> None:
    store = store_release(releases[0], tmp_path / "store")
    fetch = run_python("-m", "components", "recall", "fetch", env=store.environment() | {"URM_HOME": str(tmp_path)})
    assert fetch.returncode == 0 and f"release {releases[0].name} is verified" in fetch.stdout, fetch.stderr
    shutil.rmtree(store.folder)
    ad_hoc = ("workers", "--instances", "0", "--ad-hoc", "1")
    process, url = start_container(*ad_hoc, environment=store.environment())

    def is_ready() -> bool:
        with suppress(httpx.TransportError):  # it listens once the libraries are imported
            return httpx.get(f"{url}/readyz").is_success
        return False

    wait_until(is_ready, seconds=120)
    assert read_publication(client, SERVING) is None  # that is for the workers of the event stream to say
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert live_workers(client) == set()


def test_a_pod_whose_release_cannot_be_loaded_ends_and_says_why(
    start_container: StartContainer, client: redis.Redis, releases: tuple[Release, Release], tmp_path: Path
) -> None:
    store = store_release(releases[0], tmp_path / "store")
    (store.folder / "bundle" / "index.faiss").write_bytes(b"")
    environment = store.environment()
    fetch = run_python("-m", "components", "recall", "fetch", env=environment | {"URM_HOME": str(tmp_path)})
    process, _ = start_container("workers", "--instances", "1", environment=environment, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=120)
    assert (fetch.returncode, process.returncode) == (2, 2)
    for last in (fetch.stderr.splitlines()[-1], errors.splitlines()[-1]):
        assert re.match(r"error bundle .*, file index\.faiss: expected \d+ bytes, got 0 bytes; build", last), errors
    assert read_publication(client, SERVING) is None and live_workers(client) == set()


def test_a_pod_ends_at_once_while_its_release_is_loaded(
    start_container: StartContainer, client: redis.Redis, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # a store that takes connections and never answers
        bundle = f"http://127.0.0.1:{silent.getsockname()[1]}/bundle"
        publication = Publication(release="urm-x", bundle=bundle, manifest="0" * 64, order=1)
        process, _ = start_container("worker", environment=Store(tmp_path / "store", publication).environment())
        silent.settimeout(120)
        connection, _ = silent.accept()
        with connection:
            assert live_workers(client)
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0
    assert live_workers(client) == set()


def test_two_instances_serve_and_survive_the_death_of_one(
    start_container: StartContainer,
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
) -> None:
    seed = random.randrange(10**6)
    print("seed", seed)  # shown if the test fails
    process, url = start_container("workers", "--instances", "2")
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
    name, killed = name_worker(victim), psutil.Process(victim)
    killed.kill()
    killed.wait(timeout=30)  # else it may send one more heartbeat
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
