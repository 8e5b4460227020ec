"""The way to Redis: which addresses are refused, and which errors pass."""

import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from fastapi.testclient import TestClient

from components.config import RecallConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import ConfigError, ReleaseError, UnavailableError
from components.recall.api.app import create_app
from components.recall.operate.forget import forget_user
from components.recall.operate.intake import feed
from components.recall.process.launch import run_worker
from components.recall.serving.engine import ServingRelease, load_release
from components.recall.state.scripts import STREAM
from components.recall.worker.stream import RecallWorker
from components.redis_client import is_unavailable, open_redis, redis_errors, require_password
from components.release.publication import Publication, hold_promotion_lock, live_workers, publish
from components.settings import Settings
from tests.worlds import REPOSITORY
from tests.worlds.api import problem
from tests.worlds.recall import Release, client, make_event, redis_server, releases, wait_until
from tests.worlds.servers import RedisServer, free_port, own_server
from tests.worlds.tiny import make_config

__all__ = ["client", "own_server", "redis_server", "releases"]  # fixtures


@pytest.mark.parametrize(
    "error",
    [
        redis.ConnectionError("Connection refused"),
        redis.TimeoutError("Timeout reading from socket"),
        redis.exceptions.BusyLoadingError("Redis is loading the dataset in memory"),
        redis.exceptions.ReadOnlyError("You can't write against a read only replica."),
        redis.exceptions.OutOfMemoryError("command not allowed when used memory > 'maxmemory'."),
        redis.ResponseError("MISCONF Redis is configured to save RDB snapshots, but cannot persist on disk."),
        redis.ResponseError("NOREPLICAS Not enough good replicas to write."),
        redis.ResponseError("Command # 1 (EVALSHA f 3 urm...) of pipeline caused error: (\"MISCONF it can't\",)"),
        redis.ResponseError("BUSY Redis is busy running a script."),
        redis.ResponseError("DENIED Running in protected mode because protected mode is enabled"),
        redis.ResponseError("UNBLOCKED force unblock from blocking operation, instance state changed"),
        redis.ResponseError("Error running script (call to f_0): @user_script: 1: -READONLY You can't write"),
        redis.ResponseError("Error running script (call to f_0): @user_script: 3: OOM command not allowed when used"),
    ],
)  # fmt: skip
def test_a_redis_that_cannot_serve_now_is_waited_for(error: redis.RedisError) -> None:
    assert is_unavailable(error)


@pytest.mark.parametrize(
    "error",
    [
        redis.ResponseError("WRONGTYPE Operation against a key holding the wrong kind of value"),
        redis.ResponseError("NOGROUP No such key 'urm:events' or consumer group 'recall'"),
        redis.ResponseError("ERR wrong number of arguments for 'set' command"),
        redis.ResponseError("Command # 1 (SET k  READONLY ) of pipeline caused error: WRONGTYPE Operation"),
        ValueError("READONLY"),
    ],
)
def test_other_errors_are_not_waited_for(error: Exception) -> None:
    assert not is_unavailable(error)


def test_a_replica_is_one_sentence_without_the_command(own_server: RedisServer) -> None:
    with open_redis(own_server.url) as client:
        client.replicaof("127.0.0.1", free_port())
        answer = "expected an answer, got an error of a server that cannot serve"
        with pytest.raises(UnavailableError, match=answer) as on, redis_errors(own_server.url):
            client.eval("return redis.call('SET', KEYS[1], ARGV[1])", 1, "key", "arsenic")
    assert "arsenic" not in str(on.value)


def test_a_connection_that_the_server_has_closed_is_made_anew(own_server: RedisServer) -> None:
    with open_redis(own_server.url) as client, redis.Redis.from_url(own_server.url) as other:
        client.set("key", "before")
        other.client_kill_filter(_type="normal", skipme=True)
        assert client.get("key") == "before"


@pytest.mark.parametrize(
    "url",
    [
        "redis://:s3/cret@redis:6379/0",
        "rediss://u:s3#cret@redis:6379/0",
        "unix:///run/none.sock?password=s3cret",
        "redis://:s3cret@127.0.0.1:1/0",
    ],
)
def test_no_message_shows_a_password_not_even_one_that_is_not_escaped(url: str) -> None:
    with pytest.raises((ConfigError, UnavailableError), match=r"URM_REDIS_URL|Redis at") as raised:
        with open_redis(url) as client, redis_errors(url):
            client.ping()
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    "url", ["redis://redis:6379/0", "rediss://10.0.0.7/0", "redis://user@redis/0", "redis://127.evil.example"]
)
def test_a_redis_beyond_this_machine_needs_a_password(url: str) -> None:
    with pytest.raises(ConfigError, match="URM_REDIS_URL: expected a password for a Redis beyond this machine"):
        open_redis(url)
    with pytest.raises(ConfigError, match="URM_REDIS_URL"):
        create_app(Settings(redis_url=url), RecallConfig())


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0",
        "redis://localhost/0",
        "redis://[::1]/0",
        "unix:///run/redis.sock",
        "rediss://u:p@redis/0",
    ],
)
def test_this_machine_and_addresses_with_a_password_are_fine(url: str) -> None:
    require_password(url)


def test_a_redis_that_evicts_is_refused_when_it_comes_after_the_api(own_server: RedisServer) -> None:
    own_server.stop()
    with TestClient(create_app(Settings(redis_url=own_server.url), RecallConfig())) as api:
        own_server.start("--maxmemory-policy", "allkeys-lru")
        event = {"user_id": "1", "item_id": 2, "behavior": "view", "ts": "2026-12-01T12:00:00Z"}
        for answer in (api.post("/v1/events", json=event), api.get("/readyz/intake")):
            assert "expected a Redis that evicts nothing" in problem(answer, 503, "redis-unavailable")
        with closing(open_redis(own_server.url)) as client:
            assert client.dbsize() == 0
            client.config_set("maxmemory-policy", "noeviction")
            assert api.post("/v1/events", json=event).status_code == 202
            assert api.get("/readyz/intake").status_code == 200


def test_a_redis_that_evicts_is_refused_when_it_comes_after_the_worker(
    own_server: RedisServer,
) -> None:
    own_server.stop()
    with closing(open_redis(own_server.url)) as client:
        worker = RecallWorker(client, RecallConfig(), load_nothing)
        with pytest.raises(redis.ConnectionError):
            worker.step()
        own_server.start("--maxmemory-policy", "allkeys-lru")
        with pytest.raises(ConfigError, match="got allkeys-lru"):
            worker.step()


def load_nothing(_: Publication) -> ServingRelease:
    raise AssertionError


def test_a_redis_that_evicts_is_refused_at_the_start(client: redis.Redis, redis_server: RedisServer) -> None:
    settings = Settings(redis_url=redis_server.url)
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(ConfigError, match=r"maxmemory-policy: expected noeviction.*, got allkeys-lru"):
            with TestClient(create_app(settings, RecallConfig())):
                pass
        with pytest.raises(ConfigError, match="got allkeys-lru"):
            run_worker(settings, make_config(), "127.0.0.1", 0, ad_hoc=True)
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def refuse(publication: Publication) -> ServingRelease:
    raise ReleaseError(publication.release, expected="a bundle", got="none", remedy="make one")


def documented_rights() -> list[str]:
    (rule,) = re.findall(r"ACL SETUSER urm (.*)", (REPOSITORY / "docs" / "operations.md").read_text())
    return rule.replace("PASSWORD", "secret").split()


def test_the_documented_rights_are_enough(client: redis.Redis, redis_server: RedisServer) -> None:
    """The user that operations.md makes may do what the API and the feed do, and no harm beyond urm's keys."""
    client.execute_command("ACL", "SETUSER", "urm", *documented_rights())
    url = redis_server.url.replace("redis://", "redis://urm:secret@")
    try:
        with TestClient(create_app(Settings(redis_url=url), RecallConfig(requests_per_minute=100))) as api:
            event = {"event_id": "e1", "user_id": "3", "item_id": 1}
            assert api.post("/v1/events", json=event).status_code == 202
            assert api.get("/v1/events/e1?user_id=3").json()["state"] == "waiting"
            assert api.post("/v1/recall", json={"user_id": "3"}).status_code == 503
        with open_redis(url) as limited:
            feed(limited, iter([make_event(event_id="e2")]), RecallConfig())
            assert client.xlen(STREAM) == 2
            publish(limited, "urm-x", "/nowhere")
            worker = RecallWorker(limited, RecallConfig(), refuse, "worker-a")
            worker.step()  # heartbeat, group, gauges
            assert worker.metrics.registry.get_sample_value("urm_stream_entries") == 2
            assert live_workers(limited) == {"worker-a"}
            assert forget_user(limited, "3")["waiting events"] == 2
            for forbidden in (["FLUSHALL"], ["CONFIG", "SET", "save", ""], ["GET", "x"], ["KEYS", "*"], ["SHUTDOWN"]):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    limited.execute_command(*forbidden)
    finally:
        client.execute_command("ACL", "DELUSER", "urm")


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[str]:
    """The options of an address of a Valkey that speaks TLS alone, under an authority of its own."""
    program = shutil.which("valkey-server")
    if program is None or shutil.which("openssl") is None:
        pytest.skip("needs valkey-server, since the embedded server has no TLS, and openssl")

    def certify(name: str, *options: str) -> None:
        key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key"]
        command = ["openssl", "req", "-x509", *key, "-out", f"{name}.crt", "-days", "1", "-subj", f"/CN={name}"]
        subprocess.run([*command, *options], cwd=tmp_path, check=True, capture_output=True)

    certify("authority")
    certify("server", "-CA", "authority.crt", "-CAkey", "authority.key", "-addext", "subjectAltName=IP:127.0.0.1")
    server = RedisServer(tmp_path, program=program)
    options = {"tls-port": str(server.port), "port": "0", "tls-cert-file": str(tmp_path / "server.crt")}
    options |= {"tls-key-file": str(tmp_path / "server.key"), "tls-auth-clients": "no", "save": ""}
    server.url = f"rediss://127.0.0.1:{server.port}/0?ssl_ca_certs={tmp_path / 'authority.crt'}"
    server.start(*(part for name, value in options.items() for part in (f"--{name}", value)))
    yield server.url
    server.stop()


def test_tls_and_an_acl_user_need_nothing_but_the_url(
    tls_server: str, releases: tuple[Release, Release], tmp_path: Path
) -> None:
    """From an event to its result, with the rights that operations.md gives; not without the authority."""
    with open_redis(tls_server) as admin:
        admin.execute_command("ACL", "SETUSER", "urm", *documented_rights())
    url = tls_server.replace("rediss://", "rediss://urm:secret@")
    settings = releases[0].settings.model_copy(update={"redis_url": url})
    client = open_redis(url)

    def load(publication: Publication) -> ServingRelease:
        return load_release(publication, settings, releases[0].config.release)

    worker = RecallWorker(client, RecallConfig(k=10), load, "worker-a")
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        wait_until(lambda: live_workers(client))
        with hold_promotion_lock(client, 10) as lock:
            roll_out(WorkerFlip(client, lock), releases[0].name, str(releases[0].bundle), timeout_seconds=60)
        with TestClient(create_app(settings, RecallConfig(k=10))) as api:
            assert api.post("/v1/events", json={"user_id": "3", "item_id": 1050}).status_code == 202
            wait_until(lambda: api.get("/v1/users/3/recall").json()["source"] == "model")
    finally:
        worker.stop()
        thread.join(timeout=30)
        client.close()
    strange = tls_server.partition("?")[0]
    with pytest.raises(UnavailableError, match="certificate verify failed"), redis_errors(strange):
        open_redis(strange).ping()
