from __future__ import annotations

import redis

from tests.components.recall.conftest import Release


def test_release_is_built(releases: tuple[Release, Release], client: redis.Redis) -> None:
    assert releases[0].name != releases[1].name
