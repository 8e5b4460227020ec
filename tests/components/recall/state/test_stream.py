from __future__ import annotations

import time
from dataclasses import replace

import pytest
import redis

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.operate.deadletters import drop, list_letters, replay
from components.recall.operate.intake import feed
from components.recall.state.lineage import Served
from components.recall.state.scripts import GROUP, STREAM, accepted_key, history_keys, waiting_key
from components.recall.state.store import UserStore
from components.recall.state.stream import Entry, EventStream
from tests.worlds.recall import finish, make_event


def open_stream(client: redis.Redis, name: str, config: RecallConfig) -> EventStream:
    stream = EventStream(client, name, config)
    stream.ensure_group()
    return stream


def test_entry_is_delivered_once_and_gone_when_acknowledged(client: redis.Redis, recall_config: RecallConfig) -> None:
    first, second = open_stream(client, "a", recall_config), open_stream(client, "b", recall_config)
    event = make_event()
    feed(client, iter([event]), recall_config)
    (entry,) = first.read(10, 10)
    assert entry.event == event
    assert entry.accepted_at == pytest.approx(time.time(), abs=5)
    assert second.read(10, 10) == []
    assert first.counts() == (1, 1, 0)
    finish(client, recall_config, first, [entry])
    assert first.counts() == (0, 0, 0)


@pytest.mark.parametrize("forgotten", ["the history", "its newest event"])
def test_an_entry_stays_pending_if_redis_has_forgotten_what_was_remembered_of_it(
    client: redis.Redis, recall_config: RecallConfig, forgotten: str
) -> None:
    stream, store = open_stream(client, "a", recall_config), UserStore(client, recall_config)
    feed(client, iter([make_event(event_id="old"), make_event(event_id="new", minutes=1)]), recall_config)
    old, new = stream.read(10, 10)
    store.remember([old, new])
    order, content = history_keys(old.event.user_id)
    served = Served("a/1", "urm-x", {old.event.user_id: store.recent([old.event.user_id])[old.event.user_id].revision})
    if forgotten == "the history":
        client.delete(order, content)
        assert stream.acknowledge([old, new], served) == []
    else:  # before its revision was read
        client.zrem(order, "new")
        client.hdel(content, "e:new")
        assert stream.acknowledge([old, new], served) == [old]
    assert new.entry_id in [row["message_id"] for row in client.xpending_range(STREAM, GROUP, "-", "+", 10)]
    left = [entry for entry in (old, new) if client.xrange(STREAM, entry.entry_id, entry.entry_id)]
    assert finish(client, recall_config, stream, left) == left


def test_an_event_that_a_full_history_has_dropped_is_finished_all_the_same(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    config = recall_config.model_copy(update={"history_events": 2})
    stream = open_stream(client, "a", config)
    feed(client, iter([make_event(event_id=f"e{n}", minutes=n) for n in range(3)]), config)
    entries = stream.read(10, 10)
    assert finish(client, config, stream, entries) == entries


def test_an_entry_given_up_by_another_worker_is_not_finished_though_its_history_is_full(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    config = recall_config.model_copy(update={"history_events": 1})
    stream, other = open_stream(client, "a", config), open_stream(client, "b", config)
    feed(client, iter([make_event(event_id="bad"), make_event(event_id="good", minutes=61)]), config)
    bad, good = stream.read(10, 10)
    UserStore(client, config).remember([bad, good])
    assert other.give_up(bad.entry_id, "{}", "broken", 5, bad.event)
    assert stream.acknowledge([bad, good], Served("a/1", "urm-x", {})) == [good]
    assert client.hget(accepted_key("3", "bad"), "done") is None


def test_entry_of_a_dead_consumer_is_claimed_and_its_deliveries_counted(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    dead, alive = open_stream(client, "dead", recall_config), open_stream(client, "alive", recall_config)
    feed(client, iter([make_event()]), recall_config)
    assert len(dead.read(10, 10)) == 1
    assert alive.claim_stale(10) == []  # not idle for long enough
    time.sleep(recall_config.claim_idle_seconds)
    (entry,) = alive.claim_stale(10)
    assert entry.deliveries == 2
    finish(client, recall_config, alive, [entry])
    dead.forget_dead_consumers({"alive"})
    assert {row["name"] for row in client.xinfo_consumers(STREAM, GROUP)} == {"dead", "alive"}  # not gone for long


@pytest.mark.parametrize("fields", [{"event": "{"}, {"event": '{"user_id": "3"}'}, {"other": "x"}])
def test_what_is_no_event_becomes_a_dead_letter_at_once(
    client: redis.Redis, recall_config: RecallConfig, fields: dict[str, str]
) -> None:
    stream = open_stream(client, "a", recall_config)
    client.xadd(STREAM, fields)
    feed(client, iter([make_event()]), recall_config)
    assert len(stream.read(10, 10)) == 1
    (letter,) = list_letters(client)
    assert letter.event == fields.get("event", "")
    assert "expected" in letter.reason
    assert stream.counts() == (1, 1, 1)


def test_dead_letters_are_replayed_or_dropped(client: redis.Redis, recall_config: RecallConfig) -> None:
    stream = open_stream(client, "a", recall_config)
    feed(client, (make_event(event_id=f"e{number}") for number in range(3)), recall_config)
    for entry in stream.read(10, 10):
        assert stream.give_up(entry.entry_id, entry.event.model_dump_json(), "why", 5, entry.event)
    first, second, third = list_letters(client)
    assert (first.reason, first.deliveries) == ("why", 5)
    assert replay(client, [second.letter_id]) == 1
    assert [entry.event.event_id for entry in stream.read(10, 10)] == ["e1"]
    assert drop(client, [first.letter_id]) == 1
    assert [letter.letter_id for letter in list_letters(client)] == [third.letter_id]
    with pytest.raises(DataError, match="dead letter '9-9': expected the id of a dead letter"):
        replay(client, ["9-9"])
    with pytest.raises(DataError, match="dead letter 'nonsense'"):
        drop(client, ["nonsense"])
    assert drop(client, []) == 1
    assert list_letters(client) == []


def test_claimed_entry_counts_as_delivered_only_when_it_is_begun(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """An entry that kills its worker must not use up the tries of those claimed with it."""
    stream = open_stream(client, "a", recall_config)
    feed(client, (make_event(str(user)) for user in range(2)), recall_config)
    stream.read(10, 10)
    for deliveries in (2, 3):
        time.sleep(recall_config.claim_idle_seconds)
        killer, behind = stream.claim_stale(10)
        assert (killer.deliveries, behind.deliveries) == (deliveries, 2)
        assert stream.begin([killer]) == [killer]
    finish(client, recall_config, stream, [behind])
    assert stream.begin([killer, behind]) == [killer]  # the other was finished meanwhile


def test_entry_is_given_up_once_and_never_after_it_was_finished(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    stream, store = open_stream(client, "a", recall_config), UserStore(client, recall_config)
    done, bad = make_event(event_id="done"), make_event(event_id="bad")
    feed(client, iter([done, bad]), recall_config)
    first, second = stream.read(10, 10)
    store.remember([first, second])
    finish(client, recall_config, stream, [first])
    assert not stream.give_up(first.entry_id, "text", "another worker was faster", 5, done)
    assert stream.give_up(second.entry_id, bad.model_dump_json(), "why", 5, bad)
    assert not stream.give_up(second.entry_id, "text", "why", 5, bad)
    assert [letter.reason for letter in list_letters(client)] == ["why"]
    assert store.remember([first, second]) == ["gone", "gone"]  # by a worker that stood still meanwhile
    assert store.recent(["3"])["3"].events == [done]
    assert store.recent(["3"])["3"].revision == 3
    assert stream.counts() == (0, 0, 1)

    assert replay(client, []) == 1
    assert store.remember([second]) == ["gone"]
    assert store.remember(stream.read(10, 10)) == ["in_order"]
    assert store.recent(["3"])["3"].events == [bad, done]


def test_dead_consumer_is_removed_unless_something_is_pending_for_it(client: redis.Redis) -> None:
    config = RecallConfig(claim_idle_seconds=0.01)
    alive, busy, idle = (open_stream(client, name, config) for name in ("alive", "busy", "idle"))
    feed(client, (make_event(str(user)) for user in range(3)), config)
    for stream in (busy, idle, alive):
        entries = stream.read(1, 10)
        if stream is not busy:
            finish(client, config, stream, entries)
    time.sleep(0.15)
    alive.forget_dead_consumers({"alive"})
    assert {row["name"] for row in client.xinfo_consumers(STREAM, GROUP)} == {"alive", "busy"}


def test_consumer_leaves_unless_it_has_work_pending(client: redis.Redis, recall_config: RecallConfig) -> None:
    stream = open_stream(client, "a", recall_config)
    feed(client, iter([make_event()]), recall_config)
    entries = stream.read(10, 10)
    stream.leave()
    assert len(client.xinfo_consumers(STREAM, GROUP)) == 1
    finish(client, recall_config, stream, entries)
    stream.leave()
    assert client.xinfo_consumers(STREAM, GROUP) == []


def test_a_users_waiting_entries_are_read_ahead_but_not_those_of_another_consumer(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    first, second = open_stream(client, "a", recall_config), open_stream(client, "b", recall_config)
    names = ["u1", "v1", "u2", "v2", "u3"]
    feed(client, iter([make_event(name[0], event_id=name, minutes=n) for n, name in enumerate(names)]), recall_config)
    (u1,) = first._decode(first._read(">", 1, None), {})
    (v1,) = second._decode(second._read(">", 1, None), {})
    ahead = first.read_ahead([u1])
    assert [(entry.event.event_id, entry.deliveries) for entry in ahead] == [("u2", 1), ("u3", 1)]
    assert first.unfinished("u") == {"u1", "u2", "u3"}
    assert second.read_ahead([make_entry_of("u", v1)]) == []  # all of them are the first consumer's
    finish(client, recall_config, first, [u1, *ahead])
    assert first.unfinished("u") == set() and not client.exists(waiting_key("u"))
    assert [entry.event.event_id for entry in second.read(10, 10)] == ["v2"]  # the others are done
    assert second.counts() == (2, 2, 0)


def test_what_was_read_ahead_and_not_finished_is_delivered_again(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    dead, alive = open_stream(client, "dead", recall_config), open_stream(client, "alive", recall_config)
    feed(client, iter([make_event("u", event_id=f"u{n}", minutes=n) for n in range(3)]), recall_config)
    (entry,) = dead._decode(dead._read(">", 1, None), {})
    assert len(dead.read_ahead([entry])) == 2
    assert [one.event.event_id for one in alive.read(10, 10)] == ["u1", "u2"]
    time.sleep(recall_config.claim_idle_seconds)
    assert [one.event.event_id for one in alive.claim_stale(10)] == ["u0", "u1", "u2"]


def test_tries_ahead_of_its_turn_do_not_count_when_the_turn_comes(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """So an event that fails may be tried up to twice `max_deliveries` times, as docs/guarantees.md says."""
    first, second = open_stream(client, "a", recall_config), open_stream(client, "b", recall_config)
    feed(client, iter([make_event("u", event_id=f"u{n}", minutes=n) for n in range(2)]), recall_config)
    (entry,) = first._decode(first._read(">", 1, None), {})
    (ahead,) = first.read_ahead([entry])
    time.sleep(recall_config.claim_idle_seconds)
    assert [one.deliveries for one in first.begin(first.claim_stale(10))] == [2, 2]
    assert [(one.entry_id, one.deliveries) for one in second.read(10, 10)] == [(ahead.entry_id, 1)]
    time.sleep(recall_config.claim_idle_seconds)
    assert [one.deliveries for one in second.claim_stale(10)] == [3, 2]


def test_reading_ahead_takes_the_oldest_that_a_history_holds(client: redis.Redis) -> None:
    config = RecallConfig(history_events=3)
    stream = open_stream(client, "a", config)
    feed(client, iter([make_event("u", event_id=f"u{n}", minutes=n) for n in range(20)]), config)
    (entry,) = stream._decode(stream._read(">", 1, None), {})
    assert [one.event.event_id for one in stream.read_ahead([entry])] == ["u1", "u2", "u3"]


def make_entry_of(user_id: str, entry: Entry) -> Entry:
    return replace(entry, event=make_event(user_id))
