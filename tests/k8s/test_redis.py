"""The server of the component `redis`: its configuration, with the users of docs/kubernetes.md, on a real server."""

import re
import subprocess
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import redis

from components.config.sections import RecallConfig
from components.recall.operate.forget import forget_user
from components.recall.operate.intake import feed
from components.recall.state.events import Event
from components.recall.state.scripts import GROUP, STREAM
from components.recall.state.stream import EventStream
from components.redis_client import open_redis, require_no_eviction
from tests.worlds import REPOSITORY
from tests.worlds.servers import PROGRAM, free_port

DENIED = redis.exceptions.NoPermissionError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    port = free_port()
    users = re.findall(r"^ {4}(user .*)$", (REPOSITORY / "docs" / "kubernetes.md").read_text(), re.MULTILINE)
    (folder / "users.acl").write_text("\n".join([*users, ""]))
    text = (REPOSITORY / "k8s" / "components" / "redis" / "valkey.conf").read_text()
    (folder / "valkey.conf").write_text(re.sub("/data|/etc/valkey-users", str(folder), text))
    command = [PROGRAM, str(folder / "valkey.conf"), "--port", str(port), "--bind", "127.0.0.1"]
    with (Path(folder) / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log)
    deadline = time.monotonic() + 10
    while "eady to accept connections" not in (folder / "log").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield f"127.0.0.1:{port}/0"
    process.kill()
    process.wait()


def test_the_probe_may_ask_and_do_nothing_else(address: str) -> None:
    with open_redis(f"redis://{address}") as client:
        assert client.ping()
        with pytest.raises(DENIED):
            client.get(STREAM)


def test_a_password_that_leaked_is_changed_by_the_file(address: str, folder: Path) -> None:
    old, users = (folder / "users.acl").read_text(), folder / "users.acl"
    with (
        open_redis(f"redis://admin:PASSWORD@{address}") as admin,
        open_redis(f"redis://keda:PASSWORD@{address}") as keda,
    ):
        assert keda.xlen("urm:events") == 0
        users.write_text(old.replace("keda on >PASSWORD", "keda on >ANOTHER"))
        try:
            assert admin.acl_load()
            assert admin.config_get("maxmemory")
            with open_redis(f"redis://keda:PASSWORD@{address}") as late:
                with pytest.raises(redis.exceptions.AuthenticationError):
                    late.ping()
            with open_redis(f"redis://keda:ANOTHER@{address}") as new:
                assert new.xlen("urm:events") == 0
        finally:
            users.write_text(old)
            admin.acl_load()


def test_the_service_may_do_its_work(address: str) -> None:
    config = RecallConfig()
    with open_redis(f"redis://urm:PASSWORD@{address}") as client:
        require_no_eviction(client.info("memory"))
        assert client.info("persistence")["aof_enabled"] == 1
        stream = EventStream(client, "worker", config)
        stream.ensure_group()
        assert feed(client, iter([Event(user_id="1", item_id=1, ts=datetime.now(UTC))]), config).accepted == 1
        [entry] = stream.read(10, 100)
        assert entry.event.user_id == "1"
        assert forget_user(client, "1")
        with pytest.raises(DENIED):
            client.set("another", 1)
        with pytest.raises(DENIED):
            client.flushdb()


def test_keda_may_count_and_not_read(address: str) -> None:
    with open_redis(f"redis://urm:PASSWORD@{address}") as client:
        EventStream(client, "worker", RecallConfig()).ensure_group()
    with open_redis(f"redis://keda:PASSWORD@{address}") as client:
        assert (client.xlen(STREAM), client.xpending(STREAM, GROUP)["pending"]) == (0, 0)
        with pytest.raises(DENIED):
            client.xrange(STREAM)
