import json
import uuid
from datetime import timedelta

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components.config import RecallConfig
from components.recall.operate.forget import forget_user
from components.recall.state.events import encode_event
from components.recall.state.scripts import CONTROL, STREAM, history_keys, result_key
from components.recall.state.store import Commit, RecentEvents, Result, UserStore
from components.recall.state.stream import Entry
from tests.worlds.recall import add_entries, add_history, make_event
from tests.worlds.tiny import LAST_EVENT

VERSIONS = st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.integers(0, 3)), min_size=1, max_size=8)


def make_result(minutes: int, release: str = "r") -> Result:
    at = LAST_EVENT + timedelta(minutes=minutes)
    return Result(item_ids=[1], scores=[0.5], release=release, event_id=f"e{minutes}", event_ts=at, computed_at=at)


def read(client: redis.Redis, config: RecallConfig, user: str = "3") -> RecentEvents:
    return UserStore(client, config).recent([user])[user]


def commit(
    client: redis.Redis,
    config: RecallConfig,
    entries: list[Entry],
    recent: RecentEvents,
    results: dict[str, Result],
    order: int = 1,
) -> int | None:
    """Commit results of a history with the entries' events; a batch of its own."""
    joined, _ = recent.join([entry.event for entry in entries], config.history_events)
    commits = [Commit(entries, joined, results)]
    (stored,) = UserStore(client, config).commit(commits, release="r", order=order, batch=uuid.uuid4().hex)
    return stored


def test_result_reads_back_and_expires(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    assert store.result("3", "t") is None
    entries = add_entries(client, [make_event()])
    assert commit(client, recall_config, entries, RecentEvents([]), {"t": make_result(1)}) == 1
    assert store.result("3", "t") == make_result(1)
    assert 0 < client.ttl(result_key("3", "t")) <= recall_config.result_ttl_seconds
    assert client.xlen(STREAM) == 0


def test_scores_are_stored_with_as_many_digits_as_the_model_has(client: redis.Redis) -> None:
    scores = [7.312345504760742, 1.1920928955078125e-07, -0.5]  # floats of 32 bits
    stored = make_result(1).model_copy(update={"scores": scores}).model_dump_json()
    assert '"scores":[7.312346,1.192093e-7,-0.5]' in stored
    client.hset(result_key("3", "t"), "body", stored)
    found = UserStore(client, RecallConfig()).result("3", "t")
    assert found is not None and found.scores == pytest.approx(scores, rel=1e-7)


def test_live_events_outlive_the_results(client: redis.Redis, recall_config: RecallConfig) -> None:
    """The features may be older than a result may be; without the events the next result would know less."""
    add_history(client, recall_config, [make_event()])
    for key in history_keys("3"):
        assert recall_config.result_ttl_seconds < client.ttl(key) <= recall_config.history_ttl_seconds


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(versions=VERSIONS)
def test_older_result_never_replaces_a_newer_one(
    client: redis.Redis, recall_config: RecallConfig, versions: list[tuple[int, bool, int]]
) -> None:
    """Each result comes with a new event or with one delivered again, from a release of any order."""
    client.flushall()
    first = make_event(minutes=0)
    newest = (-1, -1, -1)
    for number, (minutes, is_new, order) in enumerate(versions):
        event = make_event(minutes=minutes, event_id=f"e{number}") if is_new else first
        recent = read(client, recall_config)
        joined, _ = recent.join([event], recall_config.history_events)
        revision = recent.revision + len(joined.events) - len(recent.events)
        version = (joined.events[-1].ts_us, revision, order)
        result = {"t": make_result(1, str(version))}
        stored = commit(client, recall_config, add_entries(client, [event]), recent, result, order)
        assert stored == (version >= newest)
        newest = max(newest, version)
        kept = UserStore(client, recall_config).result("3", "t")
        assert kept is not None and kept.release == str(newest)


def test_a_history_that_has_changed_since_it_was_read_is_not_written_and_nothing_else_is(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """Two workers with events of one user: the second result would not know the first one's event."""
    one, two = add_entries(client, [make_event(event_id="one"), make_event(event_id="two", minutes=61)])
    before = read(client, recall_config)
    assert commit(client, recall_config, [one], before, {"t": make_result(1)}) == 1
    assert commit(client, recall_config, [two], before, {"t": make_result(2), "u": make_result(2)}) is None
    assert [entry_id for entry_id, _ in client.xrange(STREAM)] == [two.entry_id]
    store = UserStore(client, recall_config)
    assert store.result("3", "t") == make_result(1) and store.result("3", "u") is None
    assert commit(client, recall_config, [two], read(client, recall_config), {"t": make_result(2)}) == 1
    after = read(client, recall_config)
    assert [event.event_id for event in after.events] == ["one", "two"]
    assert after.revision == 2


def test_a_history_that_redis_has_forgotten_and_another_worker_has_begun_anew_is_another_one(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """Its revision may be the same, its events are not."""
    add_history(client, recall_config, [make_event(event_id="lost")])
    seen = read(client, recall_config)
    client.delete(*history_keys("3"))
    add_history(client, recall_config, [make_event(event_id="other")])
    assert read(client, recall_config).revision == seen.revision
    (entry,) = add_entries(client, [make_event(event_id="new")])
    assert commit(client, recall_config, [entry], seen, {"t": make_result(1)}) is None


def test_an_entry_that_is_gone_keeps_its_event_out_of_the_history(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """A worker stood still while another one gave the entry up; nobody would take the event out again."""
    kept, given_up = add_entries(client, [make_event(event_id="kept"), make_event(event_id="given up")])
    client.xdel(STREAM, given_up.entry_id)
    assert commit(client, recall_config, [kept, given_up], RecentEvents([]), {"t": make_result(1)}) is None
    assert read(client, recall_config).events == []
    assert commit(client, recall_config, [kept], RecentEvents([]), {"t": make_result(1)}) == 1


def test_events_join_a_history_in_order_late_or_again() -> None:
    old, late, new = (make_event(minutes=minute, event_id=f"e{minute}") for minute in (10, 15, 20))
    recent, how = RecentEvents([old]).join([new, late, old], limit=2)
    assert how == ["in_order", "late", "repeated"]
    assert recent.events == [late, new]


def test_history_is_ordered_by_time_and_an_event_counts_once(client: redis.Redis, recall_config: RecallConfig) -> None:
    late, early = make_event(minutes=5, event_id="late"), make_event(minutes=1, event_id="early")
    add_history(client, recall_config, [late, early, late])
    recent = add_history(client, recall_config, [early])
    assert recent.events == [early, late]
    assert recent.revision == 2
    assert UserStore(client, recall_config).recent(["nobody"]) == {"nobody": RecentEvents([])}


def test_history_keeps_the_newest_events_only(client: redis.Redis) -> None:
    events = [make_event(minutes=minute, event_id=f"e{minute}") for minute in (4, 1, 3, 5, 2)]
    recent = add_history(client, RecallConfig(history_events=3), events)
    assert [event.event_id for event in recent.events] == ["e3", "e4", "e5"]
    assert client.hlen(history_keys("3")[1]) == 5  # three events, the revision and the batch


def test_what_cannot_be_read_of_a_history_is_left_out_and_unknown_fields_are_ignored(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """Workers of two versions write one history; one event must not cost the user's recall."""
    event = make_event(event_id="good")
    add_history(client, recall_config, [event])
    newer = {**json.loads(encode_event(make_event(event_id="newer", minutes=90))), "colour": "red"}
    content = history_keys("3")[1]
    client.hset(content, mapping={"e:newer": json.dumps(newer), "e:odd": json.dumps({"event_id": "odd"})})
    assert [event.event_id for event in read(client, recall_config).events] == ["good", "newer"]


def test_users_of_odd_names_do_not_share_keys(client: redis.Redis, recall_config: RecallConfig) -> None:
    store = UserStore(client, recall_config)
    users = ["u", "u:events", "events:u", "history:u", "u:t", ":", "ü\0"]
    events = [make_event(user, event_id=f"e{number}") for number, user in enumerate(users)]
    for number, entry in enumerate(add_entries(client, events)):
        assert commit(client, recall_config, [entry], RecentEvents([]), {"t": make_result(number)}) == 1
    recent = store.recent(users)
    assert [recent[user].events for user in users] == [[event] for event in events]
    assert [store.result(user, "t") for user in users] == [make_result(number) for number in range(len(users))]


def test_who_was_erased_is_not_remembered_as_one_with_whom_inference_worked(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    store = UserStore(client, recall_config)
    add_history(client, recall_config, [make_event("3")])
    store.note_control("3")
    assert client.get(CONTROL) == "3"
    forget_user(client, "3")
    store.note_control("3")  # of a worker that answered the user before
    assert not client.exists(CONTROL)
