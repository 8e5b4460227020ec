"""A real redis-server for the session, emptied before each test, and releases of the tiny world."""

import math
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import redis
from fastapi.testclient import TestClient

from components.config import RecallConfig, RunConfig
from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.recall.api.app import create_app
from components.recall.serving.engine import Ranking, ServingRelease, load_release
from components.recall.state.events import Event
from components.recall.state.scripts import STREAM
from components.recall.state.store import Commit, RecentEvents, UserStore
from components.recall.state.stream import Entry
from components.recall.worker.adhoc import AdHocWorker
from components.recall.worker.fixed import FixedRelease
from components.recall.worker.loop import ServingLoop, SickWorkerError
from components.recall.worker.stream import RecallWorker
from components.recall.worker.switch import ReleaseSwitch
from components.redis_client import open_redis
from components.release.bundle import hash_manifest, read_manifest, write_manifest
from components.release.publication import SERVING, Publication, live_workers
from components.settings import Settings
from components.stages.release import run as release_stage
from components.storage import StageResult, run_stage
from components.urm.data.request import RecallRequest
from tests.worlds import DEVICE, REPOSITORY, make_settings, wait_until
from tests.worlds.servers import RedisServer, free_port
from tests.worlds.tiny import LAST_EVENT, make_config, make_run

__all__ = ["api", "broken_bundle", "client", "load_poisoned", "promoted"]  # fixtures
__all__ += ["recall_config", "redis_server", "releases", "start_worker"]

Loader = Callable[[Publication], ServingRelease]
StartWorker = Callable[..., Any]
POISON_ITEM = 1013


@dataclass(frozen=True)
class Release:
    """A release as its stage left it."""

    config: RunConfig
    settings: Settings
    run_dir: Path
    result: StageResult

    @property
    def name(self) -> str:
        return str(self.result.metrics["release"])

    @property
    def bundle(self) -> Path:
        return Path(self.result.outputs["bundle"])


@dataclass(frozen=True)
class Store:
    """A remote store, which is a folder, with bundle and feature store of a release in it, as it was published."""

    folder: Path
    publication: Publication

    def environment(self) -> dict[str, str]:
        """As a pod has it."""
        return {
            "URM_DEPLOY_TO": "kubernetes",
            "URM_RELEASE": self.publication.release,
            "URM_RELEASE_BUNDLE": self.publication.bundle,
            "URM_RELEASE_MANIFEST": self.publication.manifest,
            "URM_RELEASE_ORDER": str(self.publication.order),
            "URM_CACHE_DIR": str(self.folder.parent / "cache"),
        }


def store_release(release: Release, folder: Path) -> Store:
    """Copy a release into a new store."""
    bundle = Path(shutil.copytree(release.bundle, folder / "bundle"))
    manifest = read_manifest(bundle)
    shutil.copytree(manifest.feature_store, folder / "features")
    write_manifest(bundle, manifest.model_copy(update={"feature_store": f"local://{folder}/features"}))
    address, digest = f"local://{folder}/bundle", hash_manifest(bundle)
    return Store(folder, Publication(release=release.name, bundle=address, manifest=digest, order=7))


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> RedisServer:
    return start_server(tmp_path_factory.getbasetemp() / "redis", pytestconfig)


@cache  # a session fixture exists once for each folder that imports it, the server once for all
def start_server(folder: Path, config: pytest.Config) -> RedisServer:
    folder.mkdir()
    server = RedisServer(folder)
    server.start()
    config.add_cleanup(server.stop)
    return server


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as connection:
        connection.flushall()
        yield connection


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> tuple[Release, Release]:
    """Two releases of one registry, with different models."""
    return build_releases(tmp_path_factory.getbasetemp() / "releases", redis_server.url)


@cache
def build_releases(home: Path, redis_url: str) -> tuple[Release, Release]:
    settings = make_settings(home, redis_url)
    built = []
    for seed in (0, 1):
        run_dir = home / "runs" / f"run{seed}"
        config = make_run(run_dir, settings, seed=seed)
        result = run_stage("release", release_stage, config=config, run_dir=str(run_dir), settings=settings)
        built.append(Release(config, settings, run_dir, result))
    return built[0], built[1]


@pytest.fixture
def broken_bundle(releases: tuple[Release, Release], tmp_path: Path) -> Path:
    """A copy of the second release's bundle, to be damaged."""
    return Path(shutil.copytree(releases[1].bundle, tmp_path / "bundle"))


@pytest.fixture
def recall_config() -> RecallConfig:
    return make_config().recall


@pytest.fixture
def start_worker(
    client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig
) -> Iterator[StartWorker]:
    """Start workers in threads of this process; all are stopped and joined at the end."""
    settings, config = releases[0].settings, releases[0].config
    running: list[tuple[ServingLoop, threading.Thread]] = []

    def start(
        name: str = "worker-a",
        load: Loader | None = None,
        kind: type[RecallWorker | AdHocWorker] = RecallWorker,
        publication: Publication | None = None,
    ) -> ServingLoop:
        """One that follows promotions, or serves a publication for good."""

        def load_real(publication: Publication) -> ServingRelease:
            return load_release(publication, settings, config.release)

        source = partial(FixedRelease, publication) if publication else ReleaseSwitch
        worker = kind(open_redis(settings.redis_url), recall_config, load or load_real, name, source=source)
        thread = threading.Thread(target=_run, args=[worker])
        thread.start()
        running.append((worker, thread))
        wait_until(lambda: name in live_workers(client))
        return worker

    yield start
    for worker, _ in running:
        worker.stop()
    for _, thread in running:
        thread.join(timeout=30)
        assert not thread.is_alive()


@contextmanager
def runtime_process(settings: Settings, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of `urm recall` as an operator starts it, with options of subprocess; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "components", "recall", *arguments],
        cwd=REPOSITORY,
        env=runtime_environment(settings),
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def runtime_environment(settings: Settings) -> dict[str, str]:
    """Of a process of the runtime: its settings, and nothing of this one's."""
    return {
        "PATH": "/usr/bin:/bin",
        "URM_HOME": str(settings.home),
        "URM_REDIS_URL": settings.redis_url,
        "URM_DEVICE": DEVICE,
        "URM_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


def await_worker(client: redis.Redis, process: subprocess.Popen[bytes]) -> None:
    """Return once the process is a live worker; beside other tests its imports may take minutes."""
    wait_until(lambda: live_workers(client) or process.poll() is not None, seconds=300)
    assert process.poll() is None, "the worker ended before it was ready"


def _run(worker: ServingLoop) -> None:
    with suppress(SickWorkerError):  # as the process of a sick worker ends
        worker.run()


@pytest.fixture
def promoted(
    client: redis.Redis, releases: tuple[Release, Release], start_worker: StartWorker
) -> tuple[RecallWorker, Publication]:
    """A worker that serves the first release."""
    worker = start_worker()
    return worker, roll_out(WorkerFlip(client), releases[0].name, str(releases[0].bundle), timeout_seconds=60)


class PoisonedRelease(ServingRelease):
    """Breaks on every context that has the poison item first, as a model does on input it was never tried with."""

    def recommend(self, requests: Sequence[RecallRequest], k: int) -> list[Ranking]:
        if any(POISON_ITEM in request.context.item_ids[:1] for request in requests):
            raise ValueError("index out of range in self")
        return super().recommend(requests, k)


@pytest.fixture
def load_poisoned(releases: tuple[Release, Release]) -> Loader:
    def load(publication: Publication) -> ServingRelease:
        return PoisonedRelease(**vars(load_release(publication, releases[0].settings, releases[0].config.release)))

    return load


def serve_release(client: redis.Redis, release: Release, order: int = 1) -> None:
    publication = Publication(release=release.name, bundle=str(release.bundle), order=order)
    client.set(SERVING, publication.model_dump_json())


@pytest.fixture
def api(client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig) -> Iterator[TestClient]:
    """The application on a real Redis, with a serving release and no worker."""
    serve_release(client, releases[0])
    with TestClient(create_app(releases[0].settings, recall_config), raise_server_exceptions=False) as http:
        yield http


def backlog(client: redis.Redis) -> int:
    """Entries of the stream that no worker has done."""
    return int(client.xlen(STREAM))


def make_event(user_id: str = "3", item_id: int | None = 1050, minutes: float = 60.0, **fields: Any) -> Event:
    """An event some minutes after the tiny world's last one."""
    return Event(user_id=user_id, item_id=item_id, ts=LAST_EVENT + timedelta(minutes=minutes), **fields)


def add_entries(client: redis.Redis, events: Iterable[Event]) -> list[Entry]:
    """Put events into the stream; the entries as a worker reads them."""
    return [
        Entry(str(client.xadd(STREAM, {"event": event.model_dump_json()})), event, accepted_at=math.nan, deliveries=1)
        for event in events
    ]


def finish(client: redis.Redis, config: RecallConfig, entries: list[Entry]) -> list[Entry]:
    """Commit entries as a worker does, without results; returns those that are finished."""
    store = UserStore(client, config)
    finished: list[Entry] = []
    for user in dict.fromkeys(entry.event.user_id for entry in entries):
        group = [entry for entry in entries if entry.event.user_id == user]
        recent, _ = store.recent([user])[user].join([entry.event for entry in group], config.history_events)
        (stored,) = store.commit([Commit(group, recent, {})], release="urm-x", order=1, batch=uuid.uuid4().hex)
        finished += group if stored is not None else []
    return finished


def add_history(client: redis.Redis, config: RecallConfig, events: Iterable[Event]) -> RecentEvents:
    """Put events of one user into the live history, without a result; the history."""
    entries = add_entries(client, events)
    assert finish(client, config, entries) == entries
    user = entries[0].event.user_id
    return UserStore(client, config).recent([user])[user]


def free_address() -> str:
    """An address on which nothing listens."""
    return f"127.0.0.1:{free_port()}"
