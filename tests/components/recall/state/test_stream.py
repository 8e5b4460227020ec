import json
import time
from dataclasses import replace

import pytest
import redis

from components.config import RecallConfig
from components.exceptions import DataError, UnavailableError
from components.recall.operate.deadletters import drop, find_letter, list_letters, replay
from components.recall.operate.intake import feed
from components.recall.state.events import accept_arguments, encode_event
from components.recall.state.scripts import ACCEPT, GROUP, STREAM, waiting_key
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
    finish(client, recall_config, [entry])
    assert first.counts() == (0, 0, 0)


def test_an_event_that_a_full_history_has_dropped_is_finished_all_the_same(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    config = recall_config.model_copy(update={"history_events": 2})
    stream = open_stream(client, "a", config)
    feed(client, iter([make_event(event_id=f"e{n}", minutes=n) for n in range(3)]), config)
    entries = stream.read(10, 10)
    assert finish(client, config, entries) == entries


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
    finish(client, recall_config, [entry])
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
        assert stream.give_up(entry, "why")
    first, second, third = list_letters(client)
    assert (first.reason, first.deliveries) == ("why", 1)
    assert replay(client, [second.letter_id], recall_config) == 1
    assert [entry.event.event_id for entry in stream.read(10, 10)] == ["e1"]
    assert drop(client, [first.letter_id]) == 1
    assert [letter.letter_id for letter in list_letters(client)] == [third.letter_id]
    with pytest.raises(DataError, match="dead letter '9-9': expected the id of a dead letter"):
        replay(client, ["9-9"], recall_config)
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
    finish(client, recall_config, [behind])
    assert stream.begin([killer, behind]) == [killer]  # the other was finished meanwhile


def test_entry_is_given_up_once_and_never_after_it_was_finished(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    stream = open_stream(client, "a", recall_config)
    feed(client, iter([make_event(event_id="done"), make_event(event_id="bad")]), recall_config)
    first, second = stream.read(10, 10)
    assert stream.still_there([first, second]) == [first, second]
    finish(client, recall_config, [first])
    assert not stream.give_up(first, "another worker was faster")
    assert stream.give_up(second, "why")
    assert not stream.give_up(second, "why")
    assert [letter.reason for letter in list_letters(client)] == ["why"]
    assert stream.still_there([first, second]) == []
    assert finish(client, recall_config, [second]) == []  # by a worker that stood still meanwhile
    assert stream.counts() == (0, 0, 1)

    assert replay(client, [], recall_config) == 1
    assert finish(client, recall_config, [second]) == []
    assert len(finish(client, recall_config, stream.read(10, 10))) == 1
    assert [event.event_id for event in UserStore(client, recall_config).recent(["3"])["3"].events] == ["bad", "done"]


def test_replayed_letter_counts_as_waiting_and_finds_a_full_stream_full(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    stream = open_stream(client, "a", recall_config)
    feed(client, (make_event(event_id=f"e{number}") for number in range(3)), recall_config)
    for entry in stream.read(10, 10):
        stream.give_up(entry, "why")
    assert client.zcard(waiting_key("3")) == 0
    short = recall_config.model_copy(update={"max_stream_length": 2})
    with pytest.raises(UnavailableError, match="room below 2 entries, got a full stream, after 2 letters"):
        replay(client, [], short)
    assert len(list_letters(client)) == 1
    (entry, ahead) = client.xrange(STREAM)
    assert client.zrange(waiting_key("3"), 0, -1) == [entry[0], ahead[0]]


def test_letters_are_read_page_by_page(
    client: redis.Redis, recall_config: RecallConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.recall.operate.deadletters._PAGE", 2)
    stream = open_stream(client, "a", recall_config)
    feed(client, (make_event(event_id=f"e{number}") for number in range(7)), recall_config)
    entries = stream.read(10, 10)
    for entry in entries:
        stream.give_up(entry, "why")
    found = find_letter(client, "3", "e1")
    assert found is not None and '"e1"' in found.event
    assert find_letter(client, "3", "e9") is None
    assert replay(client, [found.letter_id], recall_config) == 1
    assert drop(client, []) == 6


def test_a_hot_user_is_refused_beyond_a_bound_and_costs_no_command_over_all_that_waits(client: redis.Redis) -> None:
    config = RecallConfig(max_waiting_per_user=5)
    stream = open_stream(client, "a", config)
    accept = client.register_script(ACCEPT)
    hot = [accept(**accept_arguments(make_event("bot", event_id=f"e{number}"), config)) for number in range(8)]
    assert hot == [1, 1, 1, 1, 1, -2, -2, -2]
    assert accept(**accept_arguments(make_event("other"), config)) == 1
    (first,) = stream._decode(stream._read(">", 1, None))
    client.config_resetstat()
    assert len(stream.read_ahead([first])) == 4
    assert not {"cmdstat_hkeys", "cmdstat_hgetall", "cmdstat_hvals"} & client.info("commandstats").keys()
    assert [entry.event.user_id for entry in stream.read(10, 10)][-1] == "other"


def test_entries_deleted_by_hand_leave_neither_pending_entries_nor_notes(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    stream = open_stream(client, "a", recall_config)
    for number in range(4):
        feed(client, iter([make_event(event_id=f"e{number}")]), recall_config)
        time.sleep(0.002)  # notes are told apart by milliseconds
    entries = stream.read(10, 10)
    client.xdel(STREAM, *(entry.entry_id for entry in entries[:3]))
    stream.oldest_age_seconds()
    time.sleep(recall_config.claim_idle_seconds)
    assert [entry.event.event_id for entry in stream.claim_stale(10)] == ["e3"]
    assert stream.counts() == (1, 1, 0)
    assert client.zrange(waiting_key("3"), 0, -1) == [entries[3].entry_id]


def test_newer_events_are_read_as_far_as_they_are_known_and_those_of_a_newer_form_are_left_to_newer_workers(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """A rolling upgrade, seen by the older worker."""
    stream = open_stream(client, "older", recall_config)
    more = {**json.loads(encode_event(make_event(event_id="more"))), "colour": "red"}
    client.xadd(STREAM, {"event": json.dumps(more), "accepted_at": "1.5", "version": "1", "colour": "red"})
    client.xadd(STREAM, {"event": json.dumps({"id": "of another form"}), "version": "2"})
    client.xadd(STREAM, {"event": encode_event(make_event(event_id="old"))})  # of a version before versions
    assert [entry.event.event_id for entry in stream.read(10, 10)] == ["more", "old"]
    assert list_letters(client) == []
    time.sleep(recall_config.claim_idle_seconds)
    newer = open_stream(client, "newer", recall_config)
    claimed = newer._client.xautoclaim(STREAM, GROUP, "newer", min_idle_time=0)
    assert [fields["event"] for _, fields in claimed[1]][1] == '{"id": "of another form"}'


def test_no_number_of_young_entries_hides_what_a_dead_worker_left(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    busy, dead, alive = (open_stream(client, name, recall_config) for name in ("busy", "dead", "alive"))
    feed(client, (make_event(str(user), event_id=f"e{user}") for user in range(200)), recall_config)
    young = busy.read(199, 10)
    assert len(dead.read(1, 10)) == 1
    time.sleep(recall_config.claim_idle_seconds)
    busy.begin(young)  # it is at them just now
    claimed = [entry.event.event_id for _ in range(20) for entry in alive.claim_stale(2)]
    assert claimed == ["e199"]


def test_what_a_sick_worker_hands_back_is_anothers_at_once_with_the_tries_it_had(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    config = recall_config.model_copy(update={"claim_idle_seconds": 600})
    sick, well = open_stream(client, "sick", config), open_stream(client, "well", config)
    feed(client, (make_event(str(user)) for user in range(2)), config)
    entries = sick.read(10, 10)
    assert well.claim_stale(10) == []
    sick.hand_back(entries)
    claimed = well.claim_stale(10)
    assert [entry.deliveries for entry in claimed] == [1, 1]
    assert [entry.deliveries for entry in well.begin(claimed)] == [1, 1]
    well.hand_back(claimed)
    assert [entry.deliveries for entry in sick.claim_stale(10)] == [1, 1]


def test_dead_consumer_is_removed_unless_something_is_pending_for_it(client: redis.Redis) -> None:
    config = RecallConfig(claim_idle_seconds=0.01)
    alive, busy, idle = (open_stream(client, name, config) for name in ("alive", "busy", "idle"))
    feed(client, (make_event(str(user)) for user in range(3)), config)
    for stream in (busy, idle, alive):
        entries = stream.read(1, 10)
        if stream is not busy:
            finish(client, config, entries)
    time.sleep(0.15)
    alive.forget_dead_consumers({"alive"})
    assert {row["name"] for row in client.xinfo_consumers(STREAM, GROUP)} == {"alive", "busy"}


def test_consumer_leaves_unless_it_has_work_pending(client: redis.Redis, recall_config: RecallConfig) -> None:
    stream = open_stream(client, "a", recall_config)
    feed(client, iter([make_event()]), recall_config)
    entries = stream.read(10, 10)
    stream.leave()
    assert len(client.xinfo_consumers(STREAM, GROUP)) == 1
    finish(client, recall_config, entries)
    stream.leave()
    assert client.xinfo_consumers(STREAM, GROUP) == []
    client.flushall()
    stream.leave()  # with the group, it is gone, too
    assert not client.exists(STREAM)


def test_a_users_waiting_entries_are_read_ahead_but_not_those_of_another_consumer(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    first, second = open_stream(client, "a", recall_config), open_stream(client, "b", recall_config)
    names = ["u1", "v1", "u2", "v2", "u3"]
    feed(client, iter([make_event(name[0], event_id=name, minutes=n) for n, name in enumerate(names)]), recall_config)
    (u1,) = first._decode(first._read(">", 1, None))
    (v1,) = second._decode(second._read(">", 1, None))
    ahead = first.read_ahead([u1])
    assert [(entry.event.event_id, entry.deliveries) for entry in ahead] == [("u2", 1), ("u3", 1)]
    assert client.zcard(waiting_key("u")) == 3
    assert second.read_ahead([make_entry_of("u", v1)]) == []  # all of them are the first consumer's
    finish(client, recall_config, [u1, *ahead])
    assert not client.exists(waiting_key("u"))
    assert [entry.event.event_id for entry in second.read(10, 10)] == ["v2"]  # the others are done
    assert second.counts() == (2, 2, 0)


def test_what_was_read_ahead_and_not_finished_is_delivered_again(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    dead, alive = open_stream(client, "dead", recall_config), open_stream(client, "alive", recall_config)
    feed(client, iter([make_event("u", event_id=f"u{n}", minutes=n) for n in range(3)]), recall_config)
    (entry,) = dead._decode(dead._read(">", 1, None))
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
    (entry,) = first._decode(first._read(">", 1, None))
    (ahead,) = first.read_ahead([entry])
    time.sleep(recall_config.claim_idle_seconds)
    assert [one.deliveries for one in first.begin(first.claim_stale(10))] == [2, 2]
    assert [(one.entry_id, one.deliveries) for one in second.read(10, 10)] == [(ahead.entry_id, 1)]
    time.sleep(recall_config.claim_idle_seconds)
    assert [one.deliveries for one in second.claim_stale(10)] == [3, 2]


def test_claims_take_all_that_a_dead_worker_has_of_a_user_and_what_waits_besides(
    client: redis.Redis, recall_config: RecallConfig
) -> None:
    """So that one inference covers it, as without a crash."""
    dead, busy, alive = (open_stream(client, name, recall_config) for name in ("dead", "busy", "alive"))
    feed(client, iter([make_event("u", event_id=f"u{n}", minutes=n) for n in range(6)]), recall_config)
    (first,) = dead._decode(dead._read(">", 1, None))
    dead._read(">", 2, None)
    time.sleep(recall_config.claim_idle_seconds)
    (working,) = busy._decode(busy._read(">", 1, None))
    claimed = alive.claim_stale(1)
    assert [(entry.event.event_id, entry.deliveries) for entry in claimed] == [
        ("u0", 2), ("u1", 2), ("u2", 2), ("u4", 1), ("u5", 1),
    ]  # fmt: skip
    assert (first.event.event_id, working.event.event_id) == ("u0", "u3")  # the latter is not taken from the living
    assert alive.begin(claimed) == claimed
    finish(client, recall_config, [*claimed, working])
    assert alive.counts() == (0, 0, 0)


def make_entry_of(user_id: str, entry: Entry) -> Entry:
    return replace(entry, event=make_event(user_id))
