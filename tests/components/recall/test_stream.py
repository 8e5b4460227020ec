from __future__ import annotations

import time

import pytest
import redis

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.deadletters import drop, list_letters, replay
from components.recall.intake import feed
from components.recall.scripts import GROUP, STREAM
from components.recall.stream import EventStream
from tests.components.recall.conftest import make_event


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
    first.acknowledge([entry])
    assert first.counts() == (0, 0, 0)


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
    alive.acknowledge([entry])
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
    for number in range(3):
        stream.give_up(f"{number + 1}-0", make_event(event_id=f"e{number}").model_dump_json(), "why", 5)
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


def test_consumer_leaves_unless_it_has_work_pending(client: redis.Redis, recall_config: RecallConfig) -> None:
    stream = open_stream(client, "a", recall_config)
    feed(client, iter([make_event()]), recall_config)
    entries = stream.read(10, 10)
    stream.leave()
    assert len(client.xinfo_consumers(STREAM, GROUP)) == 1
    stream.acknowledge(entries)
    stream.leave()
    assert client.xinfo_consumers(STREAM, GROUP) == []
