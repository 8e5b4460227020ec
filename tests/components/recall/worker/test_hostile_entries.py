"""Whatever lies in the stream becomes a result or a dead letter with a reason; nothing is lost, nothing stops a worker.

Anybody who reaches Redis may write into the stream, and old software may have: bytes of any kind, fields of any name.
"""

import json
from typing import Any

import redis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.operate.deadletters import list_letters, replay
from components.recall.operate.intake import feed
from components.recall.operate.terminal import show
from components.recall.state.events import Event, decode_event
from components.recall.state.scripts import DEAD_STREAM, STREAM
from components.recall.state.store import UserStore
from components.recall.state.stream import EventStream
from components.recall.worker.stream import RecallWorker
from components.redis_client import open_redis
from components.release.publication import Publication
from tests.worlds.recall import finish, make_event, wait_until
from tests.worlds.servers import RedisServer
from tests.worlds.tiny import ITEM_IDS, LAST_EVENT

FUZZ = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, derandomize=True, max_examples=150
)
GOOD = json.dumps({"event_id": "e", "user_id": "3", "item_id": 1050, "ts": LAST_EVENT.isoformat()}).encode()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
EVENT_LIKE = st.fixed_dictionaries(
    {"user_id": JSON | st.just("3"), "item_id": JSON | st.just(1050)},
    optional={name: JSON for name in ("event_id", "behavior", "query", "ts", "attributes", "colour")},
).map(lambda fields: json.dumps(fields).encode())


@st.composite
def spoiled(draw: st.DrawFn) -> bytes:
    """A good event with some bytes changed, added or taken away."""
    place = draw(st.integers(0, len(GOOD)))
    return GOOD[:place] + draw(st.binary(max_size=4)) + GOOD[place + draw(st.integers(0, 6)) :]


FIELDS = st.dictionaries(
    st.sampled_from([b"event", b"accepted_at"]) | st.binary(max_size=8),
    spoiled() | EVENT_LIKE | st.binary(max_size=40) | st.sampled_from([b"inf", b"-1", b"", b"nan", b"1_0"]),
    min_size=1,
    max_size=4,
)


@FUZZ
@given(EVENT_LIKE | spoiled() | st.binary(max_size=40))
def test_decoder_gives_an_event_or_one_sentence(content: bytes) -> None:
    text = content.decode(errors="surrogateescape")
    try:
        event = decode_event(text)
    except DataError as error:
        sentence = str(error)
        assert sentence.startswith("stream entry: expected ") and "\n" not in sentence
    else:
        assert decode_event(event.model_dump_json()) == event
        assert 0 <= event.ts_us < 2**53


@settings(FUZZ, max_examples=60)
@given(st.lists(FIELDS, min_size=1, max_size=4))
@example([{b"event": b"\xff"}, {b"\xff\xfe": b"\xff"}, {b"event": GOOD, b"accepted_at": b"\x80"}])
@example([{b"event": GOOD}, {b"event": GOOD, b"accepted_at": b"inf"}])
def test_every_entry_is_read_or_becomes_a_dead_letter(
    redis_server: RedisServer, client: redis.Redis, recall_config: RecallConfig, entries: list[dict[bytes, bytes]]
) -> None:
    client.flushall()
    with redis.Redis.from_url(redis_server.url) as raw, open_redis(redis_server.url) as worker:
        ids: list[Any] = [raw.xadd(STREAM, fields).decode() for fields in entries]
        stream = EventStream(worker, "a", recall_config)
        stream.ensure_group()
        read = stream.read(10, 10)
        letters = raw.xrange(DEAD_STREAM)
        lost = set(ids) - {entry.entry_id for entry in read} - {fields[b"entry_id"].decode() for _, fields in letters}
        assert not lost
        assert len(read) + len(letters) == len(entries)
        for _, fields in letters:
            assert fields[b"reason"].startswith(b"stream entry: expected ")
            assert fields[b"event"] == entries[ids.index(fields[b"entry_id"].decode())].get(b"event", b"")
        assert stream.counts() == (len(read), len(read), len(letters))
        for letter in list_letters(worker):
            show(letter.event).plain.encode()  # a terminal can show it
        finish(worker, recall_config, read)
        assert replay(worker, [], recall_config) == len(letters)
        assert stream.read(10, 10) == []  # they come back as what they were
        assert len(list_letters(worker)) == len(letters)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
USERS = st.sampled_from(["3", "3:events", "events:3", "[UM_0]", "\0"]) | TEXTS
EVENTS = st.builds(
    dict,
    user_id=USERS,
    item_id=st.sampled_from([None, *ITEM_IDS[:5].tolist(), 7, 0, 2**63 - 1]),
    behavior=st.sampled_from(["purchase", "view"]) | TEXTS,
    query=st.none() | st.sampled_from(["[ITEM] [LM] [UM_1]", "{{ 7 * 7 }}", "\0"]) | TEXTS,
    minutes=st.integers(-24_000_000, 200_000),  # from 1972 on
).filter(lambda fields: fields["item_id"] is not None or fields["query"] is not None)


def test_any_valid_event_is_served(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    store = UserStore(client, recall_config)

    @settings(FUZZ, max_examples=12)
    @given(st.lists(EVENTS, min_size=1, max_size=12))
    def check(rows: list[dict[str, Any]]) -> None:
        events: list[Event] = [make_event(**row) for row in rows]
        feed(client, iter(events), recall_config)
        wait_until(lambda: client.xlen(STREAM) == 0)
        assert list_letters(client) == []
        for event in events:
            result = store.result(event.user_id, "next_purchase")
            assert result is not None and len(result.item_ids) == recall_config.k

    check()


def test_late_and_unknown_events_are_counted_and_used_as_far_as_they_go(
    client: redis.Redis, promoted: tuple[RecallWorker, Publication], recall_config: RecallConfig
) -> None:
    """An event older than the features is in them already; of an item nobody knows the words remain."""
    store, value = UserStore(client, recall_config), promoted[0].metrics.registry.get_sample_value
    feed(client, iter([make_event("4", event_id="first")]), recall_config)
    wait_until(lambda: store.result("4", "new_item"))
    before = store.result("4", "new_item")
    assert before is not None
    events = [
        make_event("4", before.item_ids[0], minutes=-1, event_id="late"),
        make_event("5", minutes=1, event_id="unknown", item_id=999_999, query="shelf 3"),
    ]
    feed(client, iter(events), recall_config)
    wait_until(lambda: value("urm_worker_events_total", {"outcome": "done"}) == 3)
    assert value("urm_worker_late_events_total") == 1
    assert value("urm_worker_unknown_items_total") == 1
    late, unknown = store.result("4", "new_item"), store.result("5", "text_query")
    assert late is not None and late.event_id == "first"
    assert late.item_ids == before.item_ids  # new_item would leave out what is the user's; this is not known to be
    assert unknown is not None and unknown.query == "shelf 3"
