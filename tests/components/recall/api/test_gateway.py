import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import httpx
import pytest
import redis
from fastapi.testclient import TestClient
from structlog.testing import capture_logs

from components.config import RecallConfig
from components.exceptions import ConfigError, ReleaseError, UnavailableError
from components.recall.api.app import create_app
from components.recall.api.gateway import Gateway
from components.recall.serving.catalogue import Catalogue, load_catalogue
from components.recall.telemetry.tracing import Tracing
from components.release.bundle import describe_files, hash_manifest, read_manifest, write_manifest
from components.release.publication import SERVING, Publication, send_heartbeat
from tests.worlds.recall import Release, serve_release, wait_until


def test_release_switch_is_followed(api: TestClient, client: redis.Redis, releases: tuple[Release, Release]) -> None:
    assert api.get("/readyz").json()["release"] == releases[0].name
    send_heartbeat(client, "w", "")
    serve_release(client, releases[1], order=2)
    client.config_resetstat()
    wait_until(lambda: api.get("/readyz").json() == {"status": "ok", "release": releases[1].name, "workers": 1})
    assert "cmdstat_scan" not in client.info("commandstats")  # there are millions of keys
    gone = Publication(release="urm-gone", bundle="/nowhere", order=3)
    client.set(SERVING, gone.model_dump_json())
    assert api.get("/v1/tasks").json()["release"] == releases[1].name  # what can be read goes on


class Loader:
    """Reads a release's tables when it is told to go on, and fails while it has an error."""

    def __init__(self) -> None:
        self.calls = 0
        self.go = threading.Event()
        self.error: Exception | None = None

    def __call__(self, *arguments: Any) -> Catalogue:
        self.calls += 1
        assert self.go.wait(60)
        if self.error is not None:
            raise self.error
        return load_catalogue(*arguments)


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> Loader:
    loader = Loader()
    monkeypatch.setattr("components.recall.api.gateway.load_catalogue", loader)
    return loader


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The gateway's clock, which stands still."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("components.recall.api.gateway.time", clock)
    return clock


def test_reads_do_not_wait_for_the_next_release_nor_stop_when_it_cannot_be_read(
    api: TestClient,
    client: redis.Redis,
    releases: tuple[Release, Release],
    loader: Loader,
    clock: SimpleNamespace,
) -> None:
    def read() -> str:
        return str(api.get("/v1/users/3/recall").raise_for_status().json()["release"])

    loader.go.set()
    assert read() == releases[0].name
    loader.go.clear()
    serve_release(client, releases[1], order=2)
    assert {read() for _ in range(3)} == {releases[0].name}
    loader.error = RuntimeError("an error of a store's driver")
    with capture_logs() as logs:
        loader.go.set()
        wait_until(lambda: [line for line in logs if line["event"] == "release cannot be read"])
    assert "RuntimeError" in str(logs) and "driver" not in str(logs)
    clock.now += 29
    assert {read() for _ in range(3)} == {releases[0].name}
    assert loader.calls == 2
    loader.error = None
    clock.now += 2
    wait_until(lambda: read() == releases[1].name)
    assert loader.calls == 3


def test_reads_go_on_while_idle_connections_are_closed(
    releases: tuple[Release, Release], recall_config: RecallConfig, client: redis.Redis
) -> None:
    """As they are after a fail-over; a read may have got one of them just before."""
    serve_release(client, releases[0])

    async def read_and_close() -> None:
        gateway = Gateway(releases[0].settings, recall_config, Tracing())
        for _ in range(20):
            await asyncio.gather(gateway.catalogue(), gateway.reconnect(), gateway.catalogue())
        await gateway.close()

    asyncio.run(read_and_close())


def test_tables_other_than_the_published_ones_are_not_served(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig, broken_bundle: Path
) -> None:
    digest = hash_manifest(broken_bundle)
    publication = Publication(release=releases[1].name, bundle=str(broken_bundle), manifest=digest, order=1)
    assert load_catalogue(publication, releases[0].settings).release == releases[1].name
    elsewhere = releases[0].settings.model_copy(update={"allowed_uris": "s3://urm"})
    with pytest.raises(ConfigError, match="expected one below s3://urm"):
        load_catalogue(publication, elsewhere)
    with (broken_bundle / "titles.parquet").open("ab") as titles:
        titles.write(b"x")
    with pytest.raises(ReleaseError, match=r"file titles.parquet: expected \d+ bytes, got"):
        load_catalogue(publication, releases[0].settings)
    write_manifest(
        broken_bundle, read_manifest(broken_bundle).model_copy(update={"files": describe_files(broken_bundle)})
    )
    with pytest.raises(ReleaseError, match="as it was published"):
        load_catalogue(publication, releases[0].settings)


def test_requests_that_find_no_release_readable_wait_for_one_try(
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    loader: Loader,
    clock: SimpleNamespace,
) -> None:
    serve_release(client, releases[0])
    app = create_app(releases[0].settings, recall_config)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://api")
    loader.error = UnavailableError("store", expected="an answer", got="none", remedy="try again")

    async def ask() -> list[int]:
        asked = asyncio.gather(*(http.get("/v1/users/3/recall") for _ in range(20)))
        await asyncio.sleep(0.5)
        loader.go.set()
        return [answer.status_code for answer in await asked]

    async def ask_twice() -> tuple[list[int], list[int]]:
        async with app.router.lifespan_context(app), http:
            failed = await ask()
            loader.error = None
            clock.now += 31
            return failed, await ask()

    assert asyncio.run(ask_twice()) == ([503] * 20, [200] * 20)
    assert loader.calls == 2


def test_of_a_remote_bundle_the_api_fetches_no_model(releases: tuple[Release, Release], tmp_path: Path) -> None:
    fsspec.filesystem("memory").put(str(releases[0].bundle), f"/{tmp_path.name}", recursive=True)
    publication = Publication(release=releases[0].name, bundle=f"memory://{tmp_path.name}", order=1)
    settings = releases[0].settings.model_copy(update={"cache_dir": str(tmp_path)})
    assert load_catalogue(publication, settings).release == releases[0].name
    names = {path.name for path in (tmp_path / "bundles").rglob("*") if path.is_file()}
    assert names == {"manifest.json", "tasks.json", "titles.parquet", "fallback.parquet"}
