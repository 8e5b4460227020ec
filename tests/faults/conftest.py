"""Fault tests share the server and the releases of the recall tests, and one zygote."""

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.world import World
from tests.faults.zygote import Zygote
from tests.worlds.recall import Release, redis_server, releases
from tests.worlds.servers import RedisServer

__all__ = ["redis_server", "releases"]  # fixtures


@pytest.fixture(scope="session")
def zygote(releases: tuple[Release, Release]) -> Iterator[Zygote]:
    process = Zygote(releases[0])
    yield process
    process.close()


@pytest.fixture
def seed() -> int:
    """Printed, so that a failing run can be repeated; URM_FAULT_SEED sets it."""
    number = int(os.environ.get("URM_FAULT_SEED", random.randrange(10**6)))
    print("seed", number)
    return number


@pytest.fixture
def make_world(
    redis_server: RedisServer, releases: tuple[Release, Release], zygote: Zygote, tmp_path: Path
) -> Iterator[Callable[..., World]]:
    """Make worlds with settings of their own; all are closed at the end."""
    worlds: list[World] = []

    def make(server: RedisServer = redis_server, **recall: Any) -> World:
        worlds.append(World(server, releases[0], zygote, tmp_path, **recall))
        return worlds[-1]

    yield make
    for world in worlds:
        world.close()
