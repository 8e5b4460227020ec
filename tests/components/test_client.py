"""The client against the real API, served by uvicorn, on a real Redis."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from components.client import MAX_BYTES, AsyncRecallClient, Event, RecallApiError, RecallClient
from components.config import RecallConfig
from components.recall.api.app import create_app
from components.recall.api.tokens import Scope, issue_token
from components.recall.state.events import decode_event
from components.recall.state.scripts import STREAM, waiting_key
from components.schemas.item_keys import item_key
from tests.worlds.recall import (
    Release,
    client,
    free_address,
    make_event,
    recall_config,
    redis_server,
    releases,
    serve_release,
)
from tests.worlds.servers import serve_application

__all__ = ["client", "recall_config", "redis_server", "releases"]  # fixtures


@contextmanager
def served(release: Release, config: RecallConfig, tokens: Path | None = None) -> Iterator[str]:
    """The API's address, while it is served."""
    application = create_app(release.settings.model_copy(update={"api_tokens_file": tokens}), config)
    with serve_application(application) as address:
        yield address


@pytest.fixture
def url(client: redis.Redis, releases: tuple[Release, Release], recall_config: RecallConfig) -> Iterator[str]:
    serve_release(client, releases[0])
    with served(releases[0], recall_config) as address:
        yield address


def test_events_are_sent_in_chunks_once(url: str, client: redis.Redis) -> None:
    events = [make_event(str(n % 7), event_id="a/b" if n == 3 else f"e{n}") for n in range(1500)]
    with RecallClient(url) as api:
        sent = api.send(events)
        assert (sent.accepted, sent.duplicates, sent.refused) == (1500, 0, 0)
        assert [row.event_id for row in sent.events] == [event.event_id for event in events]
        again = api.send([*events[:3], make_event("0", item_id=7, event_id="e0"), make_event("5", event_id="new")])
        assert [row.status for row in again.events] == ["duplicate"] * 3 + ["refused", "accepted"]
        (alone,) = api.send([make_event("0", item_id=7, event_id="e0")]).events
        assert (alone.event_id, alone.status, (alone.type or "").rpartition(":")[2]) == (
            "e0",
            "refused",
            "event-conflict",
        )
        assert api.follow("a/b", "3").state == "waiting"
    assert client.xlen(STREAM) == 1501


def test_items_go_out_and_come_back_by_the_shops_own_ids(url: str, client: redis.Redis) -> None:
    with RecallClient(url) as recall:
        items = recall.recall("nobody", k=2).items
        assert [(item.external_id, item.item_id) for item in items] == [("1000", 1000), ("1001", 1001)]
        sent = [Event(user_id="3", external_id=item.external_id) for item in items]
        assert recall.send([*sent, Event(user_id="3", external_id="SKU-1")]).accepted == 3
    kept = [decode_event(fields["event"]).item_id for _, fields in client.xrange(STREAM)]
    assert kept == [1000, 1001, item_key("SKU-1")]


def test_an_event_without_a_time_gets_that_of_the_server(url: str, client: redis.Redis) -> None:
    """However wrong this machine's clock is: here an event carries a time of its own making, which nobody gave."""
    ahead = datetime.now(UTC) + timedelta(days=1)
    event = Event.model_construct(
        _fields_set={"event_id", "user_id", "item_id"}, **(vars(make_event()) | {"ts": ahead})
    )
    with RecallClient(url) as api:
        assert api.send([event]).accepted == 1
    ((_, stored),) = client.xrange(STREAM)
    assert ahead.strftime("%Y-%m-%d") not in str(stored)


def test_every_refused_event_has_a_reason_of_its_own(url: str) -> None:
    late = Event(user_id="1", item_id=1050, event_id="late", ts=datetime.now(UTC) + timedelta(days=1))
    with RecallClient(url) as api:
        api.send([make_event("1", event_id="known")])
        rows = api.send([make_event("1", event_id="known", item_id=7), late]).events
    kinds = [(row.event_id, (row.type or "").rpartition(":")[2]) for row in rows]
    assert kinds == [("known", "event-conflict"), ("late", "invalid-request")]
    assert [row.event_id in (row.detail or "") for row in rows] == [True, True]


def test_a_list_that_the_api_takes_at_no_time_is_sent_in_halves(
    client: redis.Redis, releases: tuple[Release, Release]
) -> None:
    serve_release(client, releases[0])
    events = [make_event(event_id=f"e{n}") for n in range(6)]
    config = RecallConfig(k=10, requests_per_minute=5)
    with served(releases[0], config) as url, RecallClient(url, tries=1) as api:
        with pytest.raises(RecallApiError) as raised:
            api.send(events)
        assert raised.value.code == "rate-limited"  # the second half, for this minute
    assert client.xlen(STREAM) == 3


def test_large_events_share_requests_that_are_not_too_large(url: str) -> None:
    attributes = {f"note {n}": "é" * 256 for n in range(32)}
    events = [make_event(attributes=attributes) for _ in range(300)]
    assert sum(len(event.model_dump_json().encode()) for event in events) > MAX_BYTES
    with RecallClient(url) as api:
        assert api.send(events).accepted == 300


def test_answers_are_typed_and_sync_and_async_are_alike(url: str) -> None:
    async def ask() -> tuple[object, ...]:
        async with AsyncRecallClient(url) as api:
            await api.send([Event(user_id="9", item_id=1050)])
            return await api.recall("3", k=2), await api.recall_many(["3"] * 201, "new_item"), await api.tasks()

    with RecallClient(url) as api:
        one, many, tasks = api.recall("3", k=2), api.recall_many(["3"] * 201, "new_item"), api.tasks()
    assert asyncio.run(ask()) == (one, many, tasks)
    assert one.source == "fallback" and len(one.items) == 2 and one.task == tasks.tasks[0]
    assert len(many) == 201


@pytest.mark.parametrize("bound", ["max_stream_length", "max_waiting_per_user"])
def test_a_full_stream_is_waited_for_and_what_was_refused_is_sent_again(
    client: redis.Redis, releases: tuple[Release, Release], bound: str
) -> None:
    events = [make_event(event_id=f"e{n}") for n in range(5)]
    emptied = threading.Event()

    def empty() -> None:
        while not emptied.wait(0.05):
            if client.xlen(STREAM) == 2:
                client.delete(STREAM, waiting_key("3"))

    with served(releases[0], RecallConfig(**{bound: 2})) as url, RecallClient(url) as api:
        reader = threading.Thread(target=empty)
        reader.start()
        sent = api.send(events)
        emptied.set()
        reader.join()
        assert (sent.accepted, sent.refused) == (5, 0)
    with served(releases[0], RecallConfig(**{bound: 1})) as url, RecallClient(url, tries=1) as api:
        client.flushall()
        assert [row.status for row in api.send(events[:2]).events] == ["accepted", "refused"]


def test_errors_have_a_code_and_what_passes_is_tried_again(
    client: redis.Redis, releases: tuple[Release, Release], tmp_path: Path
) -> None:
    serve_release(client, releases[0])
    secret = issue_token(tmp_path / "tokens.json", "shop", [Scope.READ])
    config = RecallConfig(k=10, requests_per_minute=1)
    with served(releases[0], config, tmp_path / "tokens.json") as url:
        with RecallClient(url, secret, tries=1) as api:
            with pytest.raises(RecallApiError, match="task: expected one of") as unknown:
                api.recall("3", "gift")
            assert (unknown.value.code, unknown.value.status) == ("unknown-task", 404)
            with pytest.raises(RecallApiError) as forbidden:
                api.send([make_event()])
            assert forbidden.value.code == "missing-scope"
            with pytest.raises(RecallApiError) as limited:
                api.tasks()
            assert limited.value.code == "rate-limited"
        with RecallClient(url) as api, pytest.raises(RecallApiError) as nobody:
            api.tasks()
        assert nobody.value.code == "no-token"
    with RecallClient(f"http://{free_address()}", tries=2) as api, pytest.raises(RecallApiError) as away:
        api.tasks()
    assert away.value.status == 0


@pytest.mark.parametrize(
    ("status", "kind", "body"),
    [
        (502, "application/problem+json", '{"title": "Bad Gateway", "status": 502}'),  # RFC 9457 asks for no more
        (403, "application/problem+json", "{}"),
        (200, "text/html", "<html>Log in</html>"),
        (200, "application/json", '{"answers": "later"}'),
    ],
)
def test_what_a_proxy_answers_in_the_place_of_the_api_is_its_error(status: int, kind: str, body: str) -> None:
    async def proxy(request: Request) -> Response:
        return Response(body, status, media_type=kind)

    with serve_application(Starlette(routes=[Route("/{path:path}", proxy, methods=["GET", "POST"])])) as address:
        with RecallClient(address, tries=1) as api:
            for call in (lambda: api.send([make_event()]), lambda: api.recall("1"), api.tasks, lambda: api.ask("1")):
                with pytest.raises(
                    RecallApiError, match=rf"expected an answer of its own, got status {status}"
                ) as error:
                    call()
                assert (error.value.status, error.value.problem) == (status, None)


def test_ad_hoc_without_a_worker_is_said(url: str) -> None:
    with RecallClient(url, tries=1) as api, pytest.raises(RecallApiError) as error:
        api.ask("3", guidance="gift")
    assert error.value.code == "no-ad-hoc-worker"
