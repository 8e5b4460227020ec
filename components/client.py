"""A typed client of the recall API, synchronous and asynchronous.

    with RecallClient("https://recall.example", token="urm_…") as client:
        client.send([Event(user_id="1", external_id="SKU-1082185")])
        client.recall("1").items

Calls are repeated while the API is full, away or limits the caller, after the time that it names in Retry-After. Events
have their ids before they are sent first, so that sending them again is harmless. Ids travel in bodies alone.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from components.recall.api.problem_types import Problem
from components.recall.api.responses import (
    AdHocAnswer,
    EventLineage,
    EventOutcome,
    EventOutcomes,
    RecallAnswer,
    RecallAnswers,
    TaskList,
)
from components.recall.state.events import Event

MAX_EVENTS, MAX_USERS, MAX_BYTES = 1000, 200, 3 * 2**20  # per request
_REPEATED = frozenset({429, 502, 503, 504})
_ASK_SECONDS = 65.0  # longer than any deadline of an ad-hoc request
LONGEST_PAUSE_SECONDS = 30.0
_T = TypeVar("_T")
_Model = TypeVar("_Model", bound=BaseModel)
# A call as a sequence of requests and pauses (seconds), which does not know whether it is awaited.
_Steps = Generator[httpx.Request | float, httpx.Response | httpx.TransportError | None, _T]

__all__ = ["AsyncRecallClient", "Event", "RecallApiError", "RecallClient"]


class RecallApiError(Exception):
    """The API refused a call, or did not answer it however often it was repeated.

    Attributes:
        status: Of the answer; 0 if there was none.
        code: Last part of the problem's type, e.g. `unknown-task`; empty if the answer was no problem document.
        problem: The document.
    """

    def __init__(self, status: int, message: str, problem: Problem | None = None) -> None:
        super().__init__(message)
        self.status, self.problem = status, problem
        self.code = problem.type.rpartition(":")[2] if problem else ""

    @classmethod
    def of(cls, answer: httpx.Response | httpx.TransportError | None) -> RecallApiError:
        """The error that an answer, or the lack of one, is."""
        if not isinstance(answer, httpx.Response):
            return cls(0, f"recall API: expected an answer, got {type(answer).__name__}; check its address.")
        if answer.headers.get("content-type") == "application/problem+json":
            with suppress(ValidationError):  # a proxy's problems have other fields
                problem = Problem.model_validate_json(answer.content)
                return cls(answer.status_code, problem.detail, problem)
        return cls(answer.status_code, f"recall API: expected an answer of its own, got status {answer.status_code}.")


class _Calls:
    """What both clients ask, and when they ask again."""

    def __init__(self, http: httpx.Client | httpx.AsyncClient, tries: int) -> None:
        self._http, self._tries = http, tries

    def _send(self, events: Iterable[Event]) -> _Steps[EventOutcomes]:
        rows: list[EventOutcome] = []
        for chunk in _chunks(events):
            rows += yield from self._send_in_parts(chunk)
        count = [row.status for row in rows].count
        return EventOutcomes(
            accepted=count("accepted"), duplicates=count("duplicate"), refused=count("refused"), events=rows
        )

    def _send_in_parts(self, chunk: list[tuple[str, str]]) -> _Steps[list[EventOutcome]]:
        """Send events at once, or in halves where the API takes no list as long."""
        try:
            return (yield from self._send_chunk(chunk))
        except RecallApiError as error:
            if error.status != 413 or len(chunk) == 1:
                raise
        middle = len(chunk) // 2
        first = yield from self._send_in_parts(chunk[:middle])
        return first + (yield from self._send_in_parts(chunk[middle:]))

    def _send_chunk(self, chunk: list[tuple[str, str]]) -> _Steps[list[EventOutcome]]:
        """Send events (id and JSON); those for which the stream has no room are sent again."""
        rows: list[EventOutcome | None] = [None] * len(chunk)
        for attempt in range(1, self._tries + 1):
            left = [place for place, row in enumerate(rows) if row is None or _is_full(row)]
            body = "[" + ",".join(chunk[place][1] for place in left) + "]"
            try:
                answer = yield from self._ask("/v1/events", content=body, headers={"Content-Type": "application/json"})
                found = _read(EventOutcomes, answer).events
            except RecallApiError as error:
                if error.problem is None or error.status not in (409, 422):
                    raise
                found = error.problem.events or [_refused(chunk[place][0], error.problem) for place in left]
            for place, row in zip(left, found, strict=True):
                rows[place] = row
            if attempt < self._tries and any(map(_is_full, found)):
                yield _pause(answer, attempt)
            else:
                break
        return [row for row in rows if row is not None]

    def _recall(self, user_ids: Sequence[str], task: str | None, k: int | None) -> _Steps[list[RecallAnswer]]:
        answers: list[RecallAnswer] = []
        params = {name: value for name, value in (("task", task), ("k", k)) if value is not None}
        for start in range(0, len(user_ids), MAX_USERS):
            body = {"user_ids": list(user_ids[start : start + MAX_USERS])}
            answer = yield from self._ask("/v1/users/recall", params=params, json=body)
            answers += _read(RecallAnswers, answer).answers
        return answers

    def _recall_one(self, user_id: str, task: str | None, k: int | None) -> _Steps[RecallAnswer]:
        return (yield from self._recall([user_id], task, k))[0]

    def _ask_model(self, user_id: str, **fields: Any) -> _Steps[AdHocAnswer]:
        body = {"user_id": user_id, **{name: value for name, value in fields.items() if value is not None}}
        # A model that took too long is not asked again: that would make it slower for all.
        answer = yield from self._ask("/v1/recall", _REPEATED - {504}, json=body, timeout=_ASK_SECONDS)
        return _read(AdHocAnswer, answer)

    def _tasks(self) -> _Steps[TaskList]:
        answer = yield from self._ask("/v1/tasks", method="GET")
        return _read(TaskList, answer)

    def _follow(self, event_id: str, user_id: str) -> _Steps[EventLineage]:
        answer = yield from self._ask("/v1/events/lineage", json={"event_id": event_id, "user_id": user_id})
        return _read(EventLineage, answer)

    def _ask(
        self, path: str, repeated: frozenset[int] = _REPEATED, method: str = "POST", **options: Any
    ) -> _Steps[httpx.Response]:
        for attempt in range(1, self._tries + 1):
            answer = yield self._http.build_request(method, path, **options)
            if isinstance(answer, httpx.Response):
                if answer.is_success:
                    return answer
                if answer.status_code not in repeated:
                    break
            if attempt < self._tries:
                yield _pause(answer, attempt)
        raise RecallApiError.of(answer)


class RecallClient(_Calls):
    """The synchronous client; a context manager."""

    _http: httpx.Client

    def __init__(self, url: str, token: str = "", tries: int = 6, timeout_seconds: float = 10.0) -> None:
        """Take the API's address, a token where it asks for one, and how often a call is tried at most."""
        super().__init__(httpx.Client(**_options(url, token, timeout_seconds)), tries)

    def send(self, events: Iterable[Event]) -> EventOutcomes:
        """Send events, 1,000 per request, and say what became of each.

        Raises:
            RecallApiError: The API stays away or full. Earlier requests were accepted: send the events again.
        """
        return self._run(self._send(events))

    def recall(self, user_id: str, task: str | None = None, k: int | None = None) -> RecallAnswer:
        """The stored recall of a user, for the release's first task if none is named."""
        return self._run(self._recall_one(user_id, task, k))

    def recall_many(self, user_ids: Sequence[str], task: str | None = None, k: int | None = None) -> list[RecallAnswer]:
        """The stored recall of users, 200 per request, in their order."""
        return self._run(self._recall(user_ids, task, k))

    def ask(
        self, user_id: str, *, task: str | None = None, query: str | None = None, guidance: str | None = None,
        k: int | None = None,
    ) -> AdHocAnswer:  # fmt: skip
        """What the model recalls for a user now; it waits for an ad-hoc worker."""
        return self._run(self._ask_model(user_id, task=task, query=query, guidance=guidance, k=k))

    def tasks(self) -> TaskList:
        """The tasks of the serving release."""
        return self._run(self._tasks())

    def follow(self, event_id: str, user_id: str) -> EventLineage:
        """What became of an event."""
        return self._run(self._follow(event_id, user_id))

    def __enter__(self) -> Self:
        """Keep connections open."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close them."""
        self._http.close()

    def _run(self, steps: _Steps[_T]) -> _T:
        answer: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = None
            if isinstance(step, float):
                time.sleep(step)
                continue
            try:
                answer = self._http.send(step)
            except httpx.TransportError as error:
                answer = error


class AsyncRecallClient(_Calls):
    """The asynchronous client; an asynchronous context manager. Methods are those of `RecallClient`."""

    _http: httpx.AsyncClient

    def __init__(self, url: str, token: str = "", tries: int = 6, timeout_seconds: float = 10.0) -> None:
        """As `RecallClient`."""
        super().__init__(httpx.AsyncClient(**_options(url, token, timeout_seconds)), tries)

    async def send(self, events: Iterable[Event]) -> EventOutcomes:
        """As `RecallClient.send`."""
        return await self._run(self._send(events))

    async def recall(self, user_id: str, task: str | None = None, k: int | None = None) -> RecallAnswer:
        """As `RecallClient.recall`."""
        return await self._run(self._recall_one(user_id, task, k))

    async def recall_many(
        self, user_ids: Sequence[str], task: str | None = None, k: int | None = None
    ) -> list[RecallAnswer]:
        """As `RecallClient.recall_many`."""
        return await self._run(self._recall(user_ids, task, k))

    async def ask(
        self, user_id: str, *, task: str | None = None, query: str | None = None, guidance: str | None = None,
        k: int | None = None,
    ) -> AdHocAnswer:  # fmt: skip
        """As `RecallClient.ask`."""
        return await self._run(self._ask_model(user_id, task=task, query=query, guidance=guidance, k=k))

    async def tasks(self) -> TaskList:
        """As `RecallClient.tasks`."""
        return await self._run(self._tasks())

    async def follow(self, event_id: str, user_id: str) -> EventLineage:
        """As `RecallClient.follow`."""
        return await self._run(self._follow(event_id, user_id))

    async def __aenter__(self) -> Self:
        """Keep connections open."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close them."""
        await self._http.aclose()

    async def _run(self, steps: _Steps[_T]) -> _T:
        answer: httpx.Response | httpx.TransportError | None = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as done:
                return done.value  # type: ignore[no-any-return]
            answer = None
            if isinstance(step, float):
                await asyncio.sleep(step)
                continue
            try:
                answer = await self._http.send(step)
            except httpx.TransportError as error:
                answer = error


def _read(kind: type[_Model], answer: httpx.Response) -> _Model:
    """An answer as its type; what is in front of the API (a login page) may have given it."""
    try:
        return kind.model_validate_json(answer.content)
    except ValidationError:
        raise RecallApiError.of(answer) from None


def _options(url: str, token: str, timeout_seconds: float) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return {"base_url": url, "headers": headers, "timeout": timeout_seconds}


def _chunks(events: Iterable[Event]) -> Iterator[list[tuple[str, str]]]:
    """Ids and JSON of events, as many as one request may hold."""
    chunk: list[tuple[str, str]] = []
    size = 0
    for event in events:
        # A time that nobody gave is for the server's clock to say.
        text = event.model_dump_json(exclude_none=True, exclude=None if "ts" in event.model_fields_set else {"ts"})
        size += len(text.encode()) + 1
        if chunk and (len(chunk) == MAX_EVENTS or size > MAX_BYTES):
            yield chunk
            chunk, size = [], len(text.encode()) + 1
        chunk.append((event.event_id, text))
    if chunk:
        yield chunk


def _refused(event_id: str, problem: Problem) -> EventOutcome:
    """The outcome of an event by the problem of its whole request: APIs before 2026-12-02 name no outcome per event."""
    return EventOutcome(event_id=event_id, status="refused", type=problem.type, detail=problem.detail)


def _is_full(row: EventOutcome) -> bool:
    return (row.type or "").rpartition(":")[2] in ("stream-full", "user-backlog-full")


def _pause(answer: httpx.Response | httpx.TransportError | None, attempt: int) -> float:
    """Seconds until the next try: as the API says, else growing; a little more at random, so that callers spread."""
    named = answer.headers.get("retry-after", "") if isinstance(answer, httpx.Response) else ""
    seconds = float(named) if named.isdigit() else 0.25 * 2**attempt
    return min(seconds, LONGEST_PAUSE_SECONDS) * random.uniform(1.0, 1.25)  # noqa: S311
