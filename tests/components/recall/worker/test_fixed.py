"""The release of a pod: loaded once, never changed; what the API takes for the serving release follows it."""

import threading
from typing import Any, cast

import pytest
import redis

from components.config import RecallConfig
from components.exceptions import ConfigError, ReleaseError, UnavailableError
from components.recall.operate.deadletters import list_letters
from components.recall.operate.intake import feed
from components.recall.serving.context import HistoryRule
from components.recall.serving.engine import ServingRelease
from components.recall.state.scripts import STREAM
from components.recall.state.store import UserStore
from components.recall.telemetry.metrics import StreamMetrics
from components.recall.worker.fixed import FixedRelease
from components.release.publication import (
    ORDER,
    SERVING,
    Publication,
    live_workers,
    publish,
    read_answers,
    read_environment,
    read_publication,
    send_heartbeat,
    unregister,
)
from components.settings import Settings
from tests.worlds.recall import Release, StartWorker, make_event, wait_until

OLD, NEW = (Publication(release=name, bundle=f"/{name}", manifest=64 * name, order=n) for n, name in enumerate("ab", 1))
NOTHING = cast(Any, None)  # neither the model nor the features are looked at


def load_nothing(publication: Publication) -> ServingRelease:
    return ServingRelease(publication, (), HistoryRule(length=1, day_origin_us=0), NOTHING, NOTHING)


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.recall.worker.fixed._CHECK_SECONDS", 0.0)


def serving(client: redis.Redis, source: FixedRelease, name: str = "worker") -> Publication | None:
    """What the API takes for the serving release after a turn of a worker; its name is its own if it has loaded."""
    source.poll()
    if source.serving is not None:
        send_heartbeat(client, name, source.serving.name)
        source.poll()
    return read_publication(client, SERVING)


def test_it_is_loaded_once_whatever_else_is_wanted(client: redis.Redis) -> None:
    loaded: list[str] = []
    gate = threading.Event()

    def load(publication: Publication) -> ServingRelease:
        loaded.append(publication.release)
        assert gate.wait(30)
        return load_nothing(publication)

    source = FixedRelease(OLD, client, "worker", load, StreamMetrics())
    source.poll()
    assert source.loading and source.serving is None and serving(client, source) is None
    gate.set()
    wait_until(lambda: serving(client, source) == OLD)
    assert not source.loading
    other = publish(client, "c", "/c")
    assert serving(client, source) == OLD and loaded == ["a"]
    assert read_answers(client, other) == read_answers(client, OLD) == {}


def test_an_ad_hoc_worker_does_not_tell_the_api(client: redis.Redis) -> None:
    source = FixedRelease(OLD, client, "worker", load_nothing, StreamMetrics(), announces=False)
    source.poll()
    wait_until(lambda: serving(client, source) or source.serving)
    assert source.serving is not None and serving(client, source) is None


def test_without_a_release_it_waits(client: redis.Redis) -> None:
    publish(client, "c", "/c")
    source = FixedRelease(None, client, "worker", load_nothing, StreamMetrics())
    source.poll()
    assert source.serving is None and not source.loading and read_publication(client, SERVING) is None


@pytest.mark.parametrize(
    ("error", "kind", "sentence"),
    [
        (KeyError("weight"), ReleaseError, "release a: expected one that loads and passes its smoke check, got KeyErr"),
        (UnavailableError("store", expected="an answer", got="none", remedy="try later"), UnavailableError, "store: "),
    ],
)
def test_a_release_that_cannot_be_loaded_ends_the_worker(
    client: redis.Redis, error: Exception, kind: type[Exception], sentence: str
) -> None:
    def fail(publication: Publication) -> ServingRelease:
        raise error

    source = FixedRelease(OLD, client, "worker", fail, StreamMetrics())
    with pytest.raises(kind, match=sentence):
        wait_until(source.poll)
    assert read_publication(client, SERVING) is None


def test_the_serving_release_is_the_newest_that_a_live_worker_serves(client: redis.Redis) -> None:
    old, new = (FixedRelease(one, client, one.release, load_nothing, StreamMetrics()) for one in (OLD, NEW))
    wait_until(lambda: serving(client, old, "old") == OLD)
    wait_until(lambda: serving(client, new, "new") == NEW)
    assert serving(client, old, "old") == NEW
    unregister(client, "new")  # as after `kubectl rollout undo`
    assert serving(client, old, "old") == OLD
    assert serving(client, new, "new") == NEW
    client.flushall()  # a Redis that has lost everything
    assert serving(client, new, "new") == NEW and client.get(ORDER) == "2"


def test_old_and_new_workers_on_one_stream_leave_no_user_without_a_result(
    client: redis.Redis,
    releases: tuple[Release, Release],
    recall_config: RecallConfig,
    start_worker: StartWorker,
) -> None:
    """A rolling upgrade, and its undo by hand."""
    old, new = (
        Publication(release=one.name, bundle=str(one.bundle), order=order) for order, one in enumerate(releases, 1)
    )
    store, users, fed = UserStore(client, recall_config), [f"user{number}" for number in range(12)], 0

    def feed_all() -> None:
        nonlocal fed
        fed += 1
        events = [make_event(user, 1000 + fed, minutes=fed, event_id=f"{user}-{fed}") for user in users]
        feed(client, iter(events), recall_config)

    def served_by() -> set[str]:
        """Which releases answered, once every user's result knows their newest event."""
        wait_until(lambda: client.xlen(STREAM) == 0)
        results = [store.result(user, "next_purchase") for user in users]
        assert [one and one.event_id for one in results] == [f"{user}-{fed}" for user in users]
        return {one.release for one in results if one}

    feed_all()
    first = start_worker("old", publication=old)
    wait_until(lambda: read_publication(client, SERVING) == old)
    assert served_by() == {old.release}
    second = start_worker("new", publication=new)
    while read_publication(client, SERVING) != new:  # until it serves, the old one does
        feed_all()
        served_by()
    for _ in range(5):
        feed_all()  # both work
        assert served_by() <= {old.release, new.release}
    first.stop()
    wait_until(lambda: live_workers(client) == {"new"})
    feed_all()
    assert served_by() == {new.release}
    start_worker("undone", publication=old)
    second.stop()
    wait_until(lambda: read_publication(client, SERVING) == old)
    feed_all()
    assert served_by() == {old.release}
    assert list_letters(client) == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"release_bundle": ""}, "release a, URM_RELEASE_BUNDLE: expected the URI of its bundle, got ''; promote"),
        ({"release_manifest": "ab"}, "URM_RELEASE_MANIFEST: expected the SHA-256 of its manifest, got 'ab'"),
        ({"release_order": "1e3"}, "URM_RELEASE_ORDER: expected the number of its publication, got '1e3'"),
    ],
)
def test_the_environment_names_a_whole_publication_or_none(changes: dict[str, str], sentence: str) -> None:
    named = {"release": "a", "release_bundle": "/a", "release_manifest": 64 * "a", "release_order": "1"}
    assert read_environment(Settings()) is None
    assert read_environment(Settings.model_validate(named)) == OLD
    with pytest.raises(ConfigError, match=sentence):
        read_environment(Settings.model_validate(named | changes))
