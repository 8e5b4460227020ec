"""Real servers that fail over, load, or refuse writes for a while: the API says so, workers wait, nothing is lost."""

import os
import random
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import redis

from components.local.services import redis_server
from components.redis_client import open_redis
from tests.faults.world import World
from tests.worlds.recall import make_event, wait_until
from tests.worlds.servers import RedisServer

USERS = [str(number) for number in range(8)]
SERVERS = {"embedded": redis_server(), "valkey": shutil.which("valkey-server"), "redis": shutil.which("redis-server")}


@pytest.fixture(params=SERVERS.values(), ids=SERVERS)
def make_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., RedisServer]]:
    """Make servers of each kind, with append-only files."""
    if request.param is None:
        pytest.skip("the machine has no such server")
    servers: list[RedisServer] = []

    def make(*options: str) -> RedisServer:
        folder = tmp_path / f"server{len(servers)}"
        folder.mkdir()
        servers.append(RedisServer(folder, program=request.param))
        servers[-1].start("--unixsocket", str(folder / "redis.sock"), *options)
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def connect(server: RedisServer) -> redis.Redis:
    return open_redis(f"redis://127.0.0.1:{server.port}/0")


def lead_to(address: Path, server: RedisServer) -> None:
    """Let a socket's address lead to a server, as the name of a primary does after a fail-over."""
    new = address.with_suffix(".new")
    new.symlink_to(server.folder / "redis.sock")
    new.replace(address)


def wait_for_events(world: World, more: int) -> None:
    """Return when so many more have been accepted."""
    before = len(world.checker.accepted_ids)
    wait_until(lambda: len(world.checker.accepted_ids) >= before + more, seconds=60)


@pytest.mark.parametrize("how", ["killed", "demoted"])
def test_after_a_failover_all_go_on_with_the_new_primary(
    make_world: Callable[..., World], make_server: Callable[..., RedisServer], tmp_path: Path, seed: int, how: str
) -> None:
    """Of a primary that was killed the newest events may be gone; one that hands over loses none."""
    first, address = make_server(), tmp_path / "redis.sock"
    second = make_server("--replicaof", "127.0.0.1", str(first.port))
    lead_to(address, first)
    first.url = f"unix://{address}"
    world = make_world(first)
    world.start_worker()
    with connect(first) as old, connect(second) as new:
        wait_until(lambda: new.info("replication")["master_link_status"] == "up")
        with world.reading(USERS, seed), world.sending(USERS, seed):
            wait_for_events(world, 30)
            if how == "killed":
                first.stop()
                new.replicaof("no", "one")
            else:
                old.execute_command("FAILOVER")
            wait_until(lambda: new.info("replication")["role"] == "master")
            world.checker.note_amnesia()
            lead_to(address, second)
            wait_for_events(world, 30)
    order, lost = world.checker.accepted_ids, world.lost()
    print("lost", len(lost), "of", len(order))
    if how == "killed":
        assert lost == (order[order.index(lost[0]) :][: len(lost)] if lost else [])  # the newest of that time
        world.checker.note_lost(lost)
    else:
        assert lost == []
    report = world.settle()
    assert report.violations == []
    assert report.dead == 0


def test_a_server_that_loads_its_data_is_waited_for(
    make_world: Callable[..., World], make_server: Callable[..., RedisServer], seed: int
) -> None:
    server = make_server()
    world = make_world(server)
    world.start_worker()
    with connect(server) as client:
        client.mset({f"ballast:{number}": os.urandom(100_000) for number in range(400)})
        client.bgrewriteaof()
        wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
    with world.reading(USERS, seed), world.sending(USERS, seed):
        wait_for_events(world, 30)
        server.stop()
        server.start("--key-load-delay", "5000", wait=False)  # microseconds; it answers after every 2 MiB
        wait_until(lambda: is_loading(server))
        seen = world.http.post("/v1/events", json=make_event("1").model_dump(mode="json"))
        wait_for_events(world, 30)
    assert seen.status_code == 503 and int(seen.headers["retry-after"]) > 0
    assert seen.json()["type"].endswith(":redis-unavailable")
    report = world.settle()
    assert world.lost() == [] and report.violations == []


def is_loading(server: RedisServer) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", server.port)) as plain:
        plain.sendall(b"PING\r\n")
        return plain.recv(8) == b"-LOADING"
    return False


def spoil_snapshots(client: redis.Redis, folder: Path) -> None:
    (folder / "dump.rdb").unlink(missing_ok=True)
    (folder / "dump.rdb").mkdir()
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def repair_snapshots(client: redis.Redis, folder: Path) -> None:
    (folder / "dump.rdb").rmdir()
    client.bgsave()
    wait_until(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "ok")


Change = Callable[[Any, Path], object]
REFUSALS: dict[str, tuple[Change, Change]] = {
    "OOM": (lambda client, _: client.config_set("maxmemory", 1), lambda client, _: client.config_set("maxmemory", 0)),
    "MISCONF": (spoil_snapshots, repair_snapshots),
    "READONLY": (lambda client, _: client.replicaof("127.0.0.1", 1), lambda client, _: client.replicaof("no", "one")),
    "NOREPLICAS": (
        lambda client, _: client.config_set("min-replicas-to-write", 1),
        lambda client, _: client.config_set("min-replicas-to-write", 0),
    ),
}


def test_a_server_that_refuses_writes_is_waited_for_and_reads_go_on(
    make_world: Callable[..., World], make_server: Callable[..., RedisServer], seed: int
) -> None:
    server = make_server()
    world = make_world(server, requests_per_minute=1_000_000)
    world.start_worker()
    with connect(server) as client, world.reading(USERS, seed), world.sending(USERS, seed):
        for name, (refuse, allow) in REFUSALS.items():
            wait_for_events(world, 20)
            refuse(client, server.folder)
            seen = world.http.post("/v1/events", json=make_event("1").model_dump(mode="json"))
            assert (seen.status_code, seen.json()["type"].rpartition(":")[2]) == (503, "redis-unavailable"), name
            assert int(seen.headers["retry-after"]) > 0
            assert world.http.get("/v1/users/1/recall").status_code == 200, name
            time.sleep(random.Random(seed).uniform(0, 0.5))
            allow(client, server.folder)
        wait_for_events(world, 20)
    report = world.settle()
    assert world.lost() == [] and report.violations == []
    assert report.dead == 0
