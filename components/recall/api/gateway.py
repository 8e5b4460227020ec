"""The API's side of Redis: accept events, read results, follow the serving release. Never waits for the model."""

import asyncio
import itertools
import math
import time
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import redis.asyncio
import structlog
from aiodataloader import DataLoader
from pydantic import ValidationError
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from components.config import RecallConfig
from components.exceptions import ConfigError, UrmError
from components.recall.api.problems import ApiError, ad_hoc_code
from components.recall.api.responses import EventLineage
from components.recall.serving.catalogue import Catalogue, load_catalogue
from components.recall.state.adhoc import AdHocRefusal, AdHocRequest, AdHocResult, enqueue_arguments, read_answer
from components.recall.state.events import Event, accept_arguments
from components.recall.state.scripts import (
    ACCEPT,
    ENQUEUE,
    accepted_key,
    ad_hoc_answer_key,
    history_keys,
    result_key,
)
from components.recall.state.store import Result
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.tracing import Tracing
from components.redis_client import is_unavailable, require_no_eviction, require_password
from components.release.publication import SERVING, WORKERS, Publication
from components.schemas.item_keys import item_key
from components.settings import Settings

log = structlog.get_logger()
# A read waits for Redis no longer than this; the caller has its own fallback.
_TIMEOUT_SECONDS = 2.0
_CONNECTIONS = 16  # one process has one core to use them with; with more, requests would only wait in Redis
_AT_WORK = 32  # ad-hoc requests that workers have taken
_RETRY_SECONDS = 30.0  # between two tries to read a release's tables


class Gateway:
    """Redis and the tables of the serving release, for one API process."""

    def __init__(self, settings: Settings, config: RecallConfig, tracing: Tracing) -> None:
        self._settings = settings
        self._config = config
        self._tracing = tracing
        self._client = _connect(settings, _TIMEOUT_SECONDS, _CONNECTIONS)
        # Ad-hoc requests wait on connections of their own: as many as may wait in the queue, and some at work.
        patience = config.ad_hoc_deadline_seconds + _TIMEOUT_SECONDS
        self._patient = _connect(settings, patience, config.ad_hoc_queue + _AT_WORK)
        self._enqueue = self._client.register_script(ENQUEUE)
        self._accept = self._client.register_script(ACCEPT)
        self._catalogue: Catalogue | None = None
        self._loading: asyncio.Task[None] | None = None
        self._failed: Publication | None = None
        self._retry_at = 0.0
        self._checked = False

    @property
    def connections(self) -> Any:
        """The pool of connections for what does not wait."""
        return self._client.connection_pool

    async def accept(self, events: list[Event]) -> list[int]:
        """Put events into the stream; the answers of the script ACCEPT.

        Raises:
            ApiError: Redis, which was away at the start, would evict them.
        """
        await self._check_late()
        events = await self._number_items(events)
        with self._tracing.accept(len(events)) as traceparent:
            async with self._client.pipeline(transaction=False) as pipe:
                for event in events:
                    await self._accept(**accept_arguments(event, self._config, traceparent), client=pipe)
                answers: list[int] = await pipe.execute()
        return answers

    async def _number_items(self, events: list[Event]) -> list[Event]:
        """Look external ids up in the serving release; without one, ingest's rule gives the numbers."""
        if all(event.external_id is None for event in events):
            return events
        try:
            find = (await self.catalogue()).find
        except ApiError as error:
            if error.code != "no-release":
                raise
            find = item_key
        return [event.with_item(find) for event in events]

    async def ask(self, request: AdHocRequest) -> AdHocResult:
        """Wait for an ad-hoc worker's answer.

        Raises:
            ApiError: There is none, or not in time.
        """
        outcome = await self._enqueue(**enqueue_arguments(request, self._config))
        popped = None
        if outcome == 1:
            key = ad_hoc_answer_key(request.request_id)
            popped = await self._patient.blpop([key], self._config.ad_hoc_deadline_seconds)
        answer = read_answer(outcome, popped, self._config)
        if isinstance(answer, AdHocRefusal):
            code = ad_hoc_code(answer.status)
            raise ApiError(code, answer.subject, expected=answer.expected, got=answer.got, remedy=answer.remedy)
        return answer

    async def lineage(self, user_id: str, event_id: str) -> EventLineage:
        """What became of an event, and which tasks' results know it.

        Raises:
            ApiError: Nothing is known of it.
        """
        async with self._client.pipeline(transaction=False) as pipe:
            pipe.hgetall(accepted_key(user_id, event_id))
            pipe.hexists(history_keys(user_id)[1], f"e:{event_id}")
            pipe.get(SERVING)
            mark, in_history, serving = await pipe.execute()
        if not mark and not in_history:
            raise ApiError(
                "unknown-event",
                "event",
                expected="one of this user that was accepted within a day, or is in the live history",
                got="none",
                remedy="check both ids",
            )
        tasks = (await self._follow(serving)).tasks if serving else ()
        async with self._client.pipeline(transaction=False) as pipe:
            for task in tasks:
                pipe.hget(result_key(user_id, task), "revision")
            revisions = await pipe.execute()
        known_from = int(mark.get("revision", 0)) or math.inf
        return EventLineage.of_mark(
            mark,
            event_id=event_id,
            user_id=user_id,
            in_history=in_history,
            tasks=[task for task, known in zip(tasks, revisions, strict=True) if int(known or 0) >= known_from],
        )

    async def results(self, user_ids: list[str], task: str | None) -> tuple[Catalogue, str, list[Result | None]]:
        """The serving release, the task (its first if none is named), and each user's result, in one round trip.

        Raises:
            ApiError: No release is serving.
        """
        asked = task or (self._catalogue or await self.catalogue()).tasks[0]
        answers = await self._reads.load(tuple(result_key(user_id, asked) for user_id in user_ids))
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        serving, *bodies = answers
        catalogue = await self._follow(serving)
        if task is None and catalogue.tasks[0] != asked:  # that of a release that has just replaced another
            return await self.results(user_ids, None)
        return catalogue, asked, [_read_result(body, catalogue, asked) for body in bodies]

    async def catalogue(self) -> Catalogue:
        """Tables of the serving release.

        Raises:
            ApiError: No release is serving.
        """
        return await self._follow(await self._client.get(SERVING))

    async def count_workers(self) -> int:
        """Workers with a fresh heartbeat."""
        seconds, _ = await self._client.time()
        return int(await self._client.zcount(WORKERS, f"({seconds}", "+inf"))

    async def check_intake(self) -> None:
        """See that Redis answers reads, and keeps what is written.

        Raises:
            redis.RedisError: It does not answer.
            ApiError: It would evict keys.
        """
        await self._client.exists(SERVING)  # a PING would be refused where writes are
        await self._check_late()

    async def check(self) -> None:
        """Look at Redis' settings, if it answers yet; else the first events are kept out until it has been done.

        Raises:
            ConfigError: It would evict keys.
        """
        try:
            require_no_eviction(await self._client.info("memory"))
            self._checked = True
        except redis.RedisError as error:
            self._checked = not is_unavailable(error)  # one that may not be asked never tells
            log.warning("redis was not checked", error=name_error(error))

    async def _check_late(self) -> None:
        if self._checked:
            return
        try:
            await self.check()
        except ConfigError as error:
            log.error("no event is accepted", error=str(error))
            raise ApiError(
                "redis-unavailable",
                "result store",
                expected="a Redis that evicts nothing",
                got="another maxmemory-policy",
                remedy="set noeviction in its configuration",
            ) from error

    async def reconnect(self) -> None:
        """Close the connections that nobody uses; the next requests open them where the address leads by then."""
        for client in (self._client, self._patient):
            await client.connection_pool.disconnect(inuse_connections=False)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()
        await self._patient.aclose()

    @cached_property
    def _reads(self) -> DataLoader[tuple[str, ...], list[Any]]:
        """Lets reads that come in one turn of the event loop share a round trip: the more wait, the less each costs.

        Made at the first read, since it keeps the running event loop.
        """
        return DataLoader(self._read, cache=False)

    async def _read(self, reads: list[tuple[str, ...]]) -> list[list[Any]]:
        """For each read the serving release and the body under each of its keys, or Redis's error in their place."""
        async with self._client.pipeline(transaction=False) as pipe:
            queue_reads(pipe, itertools.chain.from_iterable(reads))
            serving, *bodies = await pipe.execute(raise_on_error=False)
        rest = iter(bodies)
        return [[serving, *itertools.islice(rest, len(keys))] for keys in reads]

    async def _follow(self, serving: str | None) -> Catalogue:
        """Tables of the release named; until they are read, those of the one before, and only without any a wait."""
        if serving is None:
            raise ApiError(
                "no-release",
                "recall",
                expected="a serving release",
                got="none yet",
                remedy="run `urm release` and `urm promote`, with a worker running",
            )
        publication = Publication.model_validate_json(serving)
        if self._catalogue is not None and self._catalogue.release == publication.release:
            return self._catalogue
        if self._loading is None and (publication != self._failed or time.monotonic() >= self._retry_at):
            self._loading = asyncio.create_task(self._load(publication))
        if self._catalogue is None and self._loading is not None:
            await asyncio.shield(self._loading)  # others wait for it, too: it outlives a request that is given up
        if self._catalogue is None:
            raise ApiError(
                "release-unreadable",
                f"release {publication.release}",
                expected="its bundle to be readable",
                got="an error that is in the server's log",
                remedy=f"fix it, which is seen within {_RETRY_SECONDS:.0f} s, or promote another release",
            )
        return self._catalogue

    async def _load(self, publication: Publication) -> None:
        try:
            self._catalogue = await asyncio.to_thread(load_catalogue, publication, self._settings, self._config.filters)
            log.info("serving release", release=publication.release)
        except Exception as error:  # whatever a bundle or its store raises, reads go on with what is known
            self._failed, self._retry_at = publication, time.monotonic() + _RETRY_SECONDS
            reason = str(error) if isinstance(error, UrmError) else name_error(error)
            log.error(
                "release cannot be read", release=publication.release, error=reason, retry_in_seconds=_RETRY_SECONDS
            )
        finally:
            self._loading = None


def queue_reads(pipe: Any, keys: Iterable[str]) -> None:
    """Put what a read asks into a pipeline: the serving release, then the body under each key."""
    pipe.get(SERVING)
    for key in keys:
        pipe.hget(key, "body")


def _read_result(body: str | None, catalogue: Catalogue, task: str) -> Result | None:
    """A stored result without what is forbidden by now: filters and release may be younger; None if nothing is left."""
    try:
        result = None if body is None else Result.model_validate_json(body)
    except ValidationError as error:  # of another version of this software; one user must not cost a batch its answers
        log.warning("result cannot be read, the fallback is answered", error=name_error(error))
        return None
    blocked = set(catalogue.find_blocked(task, result.item_ids)) if result else None
    if result is None or not blocked:
        return result
    kept = [place for place in range(len(result.item_ids)) if place not in blocked]
    items, scores = [result.item_ids[place] for place in kept], [result.scores[place] for place in kept]
    return result.model_copy(update={"item_ids": items, "scores": scores}) if kept else None


def _connect(settings: Settings, timeout_seconds: float, connections: int) -> Any:
    """A client whose callers wait for one of its connections, instead of opening one each when they are many."""
    require_password(settings.redis_url)
    pool: Any = redis.asyncio.BlockingConnectionPool.from_url(
        settings.redis_url,
        max_connections=connections,
        timeout=_TIMEOUT_SECONDS,
        decode_responses=True,
        socket_timeout=timeout_seconds,
        socket_connect_timeout=_TIMEOUT_SECONDS,
        # A request may get an idle connection just as it is closed, by `reconnect` or by the server. What is sent twice
        # then does no harm: an event is accepted once, and an ad-hoc request is only answered twice.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )
    return redis.asyncio.Redis.from_pool(pool)
