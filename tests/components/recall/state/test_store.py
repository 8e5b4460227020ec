from __future__ import annotations

from datetime import timedelta

import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.config import RecallConfig
from components.recall.state.scripts import history_keys, result_key
from components.recall.state.store import Result, UserStore
from tests.worlds.recall import add_entries, make_event
from tests.worlds.tiny import LAST_EVENT

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
        version = (minutes, revision, order)
        stored = store.store("u", {"t": make_result(minutes, str(version))}, order=order, revision=revision)
        assert stored == (version >= newest)
        newest = max(newest, version)
        kept = store.result("u", "t")
        assert kept is not None and kept.release == str(newest)


def test_newer_release_that_knows_less_of_the_user_does_not_replace_an_older_one_that_knows_more(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """Two workers during a roll-out: the one that flipped first read the history before the other's late event."""
    store = UserStore(client, recall_config)
    new, late = make_event(minutes=60, event_id="new"), make_event(minutes=30, event_id="late")
    store.remember(add_entries(client, [new]))
    before = store.recent(["3"])["3"].revision
    store.remember(add_entries(client, [late]))
    after = store.recent(["3"])["3"].revision
    assert store.store("3", {"t": make_result(60, "old, knows both")}, order=1, revision=after) == 1
    assert store.store("3", {"t": make_result(60, "new, knows one")}, order=2, revision=before) == 0
    assert store.store("3", {"t": make_result(60, "new, knows both")}, order=2, revision=after) == 1


def test_history_is_ordered_by_time_and_an_event_counts_once(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    late, early = make_event(minutes=5, event_id="late"), make_event(minutes=1, event_id="early")
    entries = add_entries(client, [late, early, late])
    assert store.remember(entries) == ["in_order", "late", "repeated"]
    assert store.remember(entries[1:2]) == ["repeated"]
    recent = store.recent(["3", "nobody"])
    assert list(recent) == ["3"]
    assert recent["3"].events == [early, late]
    assert recent["3"].revision == 2


def test_history_keeps_the_newest_events_only(client: redis.Redis) -> None:
    store = UserStore(client, RecallConfig(history_events=3))
    events = [make_event(minutes=minute, event_id=f"e{minute}") for minute in (4, 1, 3, 5, 2)]
    store.remember(add_entries(client, events))
    assert [event.event_id for event in store.recent(["3"])["3"].events] == ["e3", "e4", "e5"]
    assert client.hlen(history_keys("3")[1]) == 4  # three events and the revision


def test_history_with_an_event_left_out_is_of_a_lower_revision(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """Else its result could replace that of the whole history, and the event, acknowledged with it, would be lost."""
    store = UserStore(client, recall_config)
    store.remember(add_entries(client, [make_event(event_id="good"), make_event(event_id="other")]))
    recent = store.recent(["3"], without={"other", "unknown"})["3"]
    assert [event.event_id for event in recent.events] == ["good"]
    assert recent.revision == 1
    assert store.recent(["3"])["3"].revision == 2


def test_users_of_odd_names_do_not_share_keys(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    users = ["u", "u:events", "events:u", "history:u", "u:t", ":", "ü\0"]
    events = [make_event(user, event_id=f"e{number}") for number, user in enumerate(users)]
    store.remember(add_entries(client, events))
    recent = store.recent(users)
    assert [recent[user].events for user in users] == [[event] for event in events]
    for number, user in enumerate(users):
        assert store.store(user, {"t": make_result(number)}, order=1, revision=1) == 1
    assert [store.result(user, "t") for user in users] == [make_result(number) for number in range(len(users))]
