"""A real redis-server for the session, emptied before each test, and releases of the tiny world."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import redis

from components.config import RunConfig
from components.release.stage import run as release_stage
from components.settings import Settings
from components.storage import StageResult, run_stage
from tests.components.recall.servers import RedisServer
from tests.components.recall.tiny import make_run, make_settings


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


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture
def client(redis_server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_server.url, decode_responses=True) as connection:
        connection.flushall()
        yield connection


@pytest.fixture(scope="session")
def releases(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> tuple[Release, Release]:
    """Two releases of one registry, with different models."""
    home = tmp_path_factory.mktemp("home")
    settings = make_settings(home, redis_server.url)
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
