"""The runbook's `Restore from a backup`, step by step, on real processes."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from components.recall.operate.forget import forget_user
from components.release.publication import SERVING, read_publication
from tests.faults.test_failover import connect, make_server
from tests.faults.world import World
from tests.worlds.recall import wait_until
from tests.worlds.servers import RedisServer

__all__ = ["make_server"]  # a fixture


@pytest.mark.parametrize("kind", ["append-only", "snapshot"])
def test_a_backup_is_restored_as_the_runbook_says(
    make_world: Callable[..., World], make_server: Callable[..., RedisServer], tmp_path: Path, seed: int, kind: str
) -> None:
    chance, server, backup = random.Random(seed), make_server(), tmp_path / "backup"
    world = make_world(server)
    world.start_worker()
    before, after = (world.make_events(["1", "2"], 10, chance) for _ in range(2))
    world.send(before)
    wait_until(world.checker.settled)
    with connect(server) as client:
        client.save()
    shutil.copytree(server.folder, backup, ignore=shutil.ignore_patterns("*.sock"))
    world.send(after)
    with connect(server) as client:
        forget_user(client, "2")

    for pid in list(world._pids):
        os.kill(pid, signal.SIGTERM)
        assert world.wait(pid) == 0
    server.stop()
    shutil.rmtree(server.folder)
    keep = "append*" if kind == "snapshot" else "dump.rdb"
    shutil.copytree(backup, server.folder, ignore=shutil.ignore_patterns(keep))
    if kind == "snapshot":
        server.start("--appendonly", "no")
        with connect(server) as client:
            client.config_set("appendonly", "yes")
            wait_until(lambda: client.info("persistence")["aof_last_bgrewrite_status"] == "ok")
            wait_until(lambda: not client.info("persistence")["aof_rewrite_in_progress"])
        server.stop()
    server.start()
    with connect(server) as client:
        serving = read_publication(client, SERVING)
        assert serving is not None and serving.release == world.release.name
        forget_user(client, "2")
    world.start_worker()
    world._start("serve", "--port", str(world.http.base_url.port))
    wait_until(world._api_answers)
    world.checker.note_amnesia()
    world.checker.note_lost([event.event_id for event in [*before, *after] if event.user_id == "2"])
    again = [event.model_dump(mode="json") for event in [*before, *after] if event.user_id == "1"]
    answer = world.http.post("/v1/events", json=again).raise_for_status().json()
    assert answer["duplicates"] == sum(event.user_id == "1" for event in before)
    report = world.settle()
    assert report.violations == [] and report.accepted == len(again) == report.visible
