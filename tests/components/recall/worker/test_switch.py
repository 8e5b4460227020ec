"""The release switch of a worker, with a real Redis and a loader that fails at will."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import redis

from components.exceptions import UnavailableError
from components.recall.serving.context import HistoryRule
from components.recall.serving.engine import ServingRelease
from components.recall.telemetry.metrics import StreamMetrics
from components.recall.worker.switch import ReleaseSwitch
from components.release.publication import (
    SERVING,
    WANTED,
    Publication,
    publish,
    read_answers,
    read_publication,
    undo_publication,
)
from tests.worlds.recall import wait_until
from tests.worlds.servers import RedisServer

NOTHING = cast(Any, None)  # a switch looks at neither the model nor the features
MakeSwitch = Callable[..., ReleaseSwitch]


class Loader:
    """Loads releases without content, but for those in `broken`."""

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.loaded: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, publication: Publication) -> ServingRelease:
        self.loaded.append(publication.release)
        assert self.gate.wait(30)
        if publication.release in self.broken:
            raise UnavailableError("bundle", expected="an answer", got="none", remedy="try later")
        return ServingRelease(publication, (), HistoryRule(length=1, day_origin_us=0), NOTHING, NOTHING)


@pytest.fixture
def loader() -> Loader:
    return Loader()


@pytest.fixture
def make_switch(client: redis.Redis, loader: Loader) -> MakeSwitch:
    def make(name: str = "worker", on: redis.Redis = client) -> ReleaseSwitch:
        return ReleaseSwitch(on, name, loader, StreamMetrics())

    return make


def serves(switch: ReleaseSwitch, release: str) -> bool:
    switch.poll()
    return switch.serving is not None and switch.serving.name == release


def rejects(switch: ReleaseSwitch, client: redis.Redis, publication: Publication) -> bool:
    switch.poll()
    return "rejected" in str(client.hgetall(f"urm:release:answers:{publication.order}"))


def set_back(client: redis.Redis, key: str, publication: Publication) -> None:
    """As in a Redis that has lost its newest writes."""
    client.set(key, publication.model_dump_json())


def test_a_worker_that_serves_nothing_tries_again_after_growing_pauses(
    client: redis.Redis, loader: Loader, make_switch: MakeSwitch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.recall.worker.switch._FIRST_PAUSE_SECONDS", 0.1)
    loader.broken = {"a"}
    switch, publication = make_switch(), publish(client, "a", "/a")
    wait_until(lambda: rejects(switch, client, publication))
    assert loader.loaded == ["a"]  # the promotion has its answer from the first try
    wait_until(lambda: switch.poll() or len(loader.loaded) == 4)
    assert switch._pause == pytest.approx(0.8)
    loader.broken = set()
    wait_until(lambda: serves(switch, "a"))
    assert read_publication(client, SERVING) == publication


def test_a_worker_that_serves_does_not_try_a_refused_release_again(
    client: redis.Redis, loader: Loader, make_switch: MakeSwitch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.recall.worker.switch._FIRST_PAUSE_SECONDS", 0.0)
    switch = make_switch()
    publish(client, "a", "/a")
    wait_until(lambda: serves(switch, "a"))
    loader.broken = {"b"}
    publication = publish(client, "b", "/b")
    wait_until(lambda: rejects(switch, client, publication))
    for _ in range(20):
        switch.poll()
    assert loader.loaded == ["a", "b"]
    assert serves(switch, "a")


def test_a_fresh_worker_that_refuses_what_is_wanted_takes_what_the_others_serve(
    client: redis.Redis, loader: Loader, make_switch: MakeSwitch
) -> None:
    old = make_switch("old")
    publish(client, "a", "/a")
    wait_until(lambda: serves(old, "a"))
    loader.broken = {"b"}
    publish(client, "b", "/b")
    fresh = make_switch("fresh")
    wait_until(lambda: serves(fresh, "a"))


def test_workers_go_on_with_a_redis_that_restarts_empty_and_follow_the_next_promotion(
    make_switch: MakeSwitch, tmp_path: Path
) -> None:
    server = RedisServer(tmp_path)
    server.start()
    try:
        with redis.Redis.from_url(server.url, decode_responses=True) as client:
            switches = [make_switch(name, client) for name in ("one", "two")]
            before = publish(client, "a", "/a")
            wait_until(lambda: all([serves(switch, "a") for switch in switches]))
            server.stop()
            server.append_only_file.write_bytes(b"")
            server.start()
            assert client.dbsize() == 0
            for switch in switches:
                switch.poll()
            assert read_publication(client, SERVING) == before
            fresh = make_switch("fresh", client)
            wait_until(lambda: serves(fresh, "a"))

            after = publish(client, "b", "/b")
            wait_until(lambda: all([serves(switch, "b") for switch in (*switches, fresh)]))
            assert read_publication(client, SERVING) == after
    finally:
        server.stop()


def serve_next(client: redis.Redis, switch: ReleaseSwitch, release: str) -> Publication:
    """Publish a release and wait until it is served."""
    publication = publish(client, release, f"/{release}")
    wait_until(lambda: serves(switch, release))
    return publication


def test_a_lost_publication_is_followed_back_to_what_is_wanted(client: redis.Redis, make_switch: MakeSwitch) -> None:
    switch = make_switch()
    first, second = (serve_next(client, switch, release) for release in ("a", "b"))
    set_back(client, WANTED, first)
    set_back(client, SERVING, first)
    wait_until(lambda: serves(switch, "a"))
    assert read_publication(client, SERVING) == first
    other = Publication(release="c", bundle="/c", order=second.order)
    set_back(client, WANTED, other)
    wait_until(lambda: serves(switch, "c"))
    assert read_publication(client, SERVING) == other


def test_a_lost_flip_is_said_again(client: redis.Redis, make_switch: MakeSwitch) -> None:
    switch = make_switch()
    first, second = (serve_next(client, switch, release) for release in ("a", "b"))
    set_back(client, SERVING, first)
    switch.poll()
    assert read_publication(client, SERVING) == second


def test_a_release_that_is_taken_back_while_it_loads_is_dropped(
    client: redis.Redis, loader: Loader, make_switch: MakeSwitch
) -> None:
    switch = make_switch()
    first = serve_next(client, switch, "a")
    loader.gate.clear()
    rejected = publish(client, "b", "/b")
    wait_until(lambda: switch.poll() or "b" in loader.loaded)
    undo_publication(client, rejected, first)  # another worker has rejected it
    served = set()
    loader.gate.set()

    def follows() -> bool:
        switch.poll()
        served.add(switch.serving.name if switch.serving else "")
        serving = read_publication(client, SERVING)
        assert serving is not None and serving.release == "a"
        return serving.order > rejected.order

    wait_until(follows)
    assert served == {"a"}
    assert read_answers(client, rejected) == {}


def test_a_fresh_worker_drops_a_first_release_that_is_taken_back(
    client: redis.Redis, loader: Loader, make_switch: MakeSwitch
) -> None:
    switch = make_switch()
    loader.gate.clear()
    publication = publish(client, "a", "/a")
    wait_until(lambda: switch.poll() or loader.loaded)
    undo_publication(client, publication, None)
    loader.gate.set()
    wait_until(lambda: switch.poll() or switch._loading is None)
    assert switch.serving is None and read_publication(client, SERVING) is None
