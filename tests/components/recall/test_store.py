from __future__ import annotations

from datetime import timedelta

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.config import RecallConfig
from components.recall.scripts import history_keys, result_key
from components.recall.store import Result, UserStore
from tests.components.recall.conftest import make_event
from tests.components.recall.tiny import LAST_EVENT

VERSIONS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=8)


def make_result(minutes: int, release: str = "r") -> Result:
    at = LAST_EVENT + timedelta(minutes=minutes)
    return Result(item_ids=[1], scores=[0.5], release=release, event_id=f"e{minutes}", event_ts=at, computed_at=at)


def test_result_reads_back_and_expires(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    assert store.result("u", "t") is None
    assert store.store("u", {"t": make_result(1)}, order=1, revision=1) == 1
    assert store.result("u", "t") == make_result(1)
    assert 0 < client.ttl(result_key("u", "t")) <= recall_config.result_ttl_seconds


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(versions=VERSIONS)
def test_older_result_never_replaces_a_newer_one(
    client: redis.Redis, recall_config: RecallConfig, versions: list[tuple[int, int, int]]
) -> None:
    client.flushall()
    store = UserStore(client, recall_config)
    newest = (-1, -1, -1)
    for minutes, order, revision in versions:
        version = (minutes, order, revision)
        stored = store.store("u", {"t": make_result(minutes, str(version))}, order=order, revision=revision)
        assert stored == (version >= newest)
        newest = max(newest, version)
        kept = store.result("u", "t")
        assert kept is not None and kept.release == str(newest)


def test_history_is_ordered_by_time_and_an_event_counts_once(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    late, early = make_event(minutes=5, event_id="late"), make_event(minutes=1, event_id="early")
    store.remember([late, early, late])
    store.remember([early])
    recent = store.recent(["3", "nobody"])
    assert list(recent) == ["3"]
    assert recent["3"].events == [early, late]
    assert recent["3"].revision == 2


def test_history_keeps_the_newest_events_only(client: redis.Redis) -> None:
    store = UserStore(client, RecallConfig(history_events=3))
    store.remember(make_event(minutes=minute, event_id=f"e{minute}") for minute in (4, 1, 3, 5, 2))
    assert [event.event_id for event in store.recent(["3"])["3"].events] == ["e3", "e4", "e5"]
    assert client.hlen(history_keys("3")[1]) == 4  # three events and the revision


def test_event_given_up_is_forgotten(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    good, bad = make_event(event_id="good"), make_event(event_id="bad")
    store.remember([good, bad])
    store.forget(bad)
    assert store.recent(["3"])["3"].events == [good]
    store.forget(good)
    assert store.recent(["3"]) == {}


def test_users_of_odd_names_do_not_share_keys(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    users = ["u", "u:events", "events:u", "history:u", "u:t", ":", "ü\0"]
    events = [make_event(user, event_id=f"e{number}") for number, user in enumerate(users)]
    store.remember(events)
    store.forget(make_event("u:events", event_id="other"))
    recent = store.recent(users)
    assert [recent[user].events for user in users] == [[event] for event in events]
    for number, user in enumerate(users):
        assert store.store(user, {"t": make_result(number)}, order=1, revision=1) == 1
    assert [store.result(user, "t") for user in users] == [make_result(number) for number in range(len(users))]
