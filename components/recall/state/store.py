"""What the worker keeps in Redis for a user: the recent events, and one result per task."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import redis
import structlog
from pydantic import BaseModel, ConfigDict, field_serializer

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.state.backfill import digest_user
from components.recall.state.events import Event, decode_event, encode_event
from components.recall.state.scripts import (
    COMMIT,
    CONTROL,
    FILL,
    FORGOTTEN,
    GROUP,
    MARK_TTL_SECONDS,
    NOTE_CONTROL,
    RENEW,
    STREAM,
    accepted_key,
    history_keys,
    result_key,
    waiting_key,
)
from components.recall.state.stream import Entry
from components.release.publication import SERVING

log = structlog.get_logger()
Joined = Literal["repeated", "in_order", "late"]
Filled = Literal["stored", "current", "changed", "forgotten", "withdrawn"]


class Result(BaseModel):
    """Content of a stored result.

    Attributes:
        item_ids: Best first.
        scores: Parallel to item_ids; stored with seven digits.
        release: Release that computed it.
        event_id: The user's newest live event when it was computed; None if there was none.
        event_ts: When that event happened.
        computed_at: When the result was computed.
        query: The words it answers, for tasks that need them.
    """

    model_config = ConfigDict(frozen=True)

    item_ids: list[int]
    scores: list[float]
    release: str
    event_id: str | None
    event_ts: datetime | None
    computed_at: datetime
    query: str | None = None

    @field_serializer("scores")
    def _shorten(self, scores: list[float]) -> list[float]:
        """The model's 32 bits are seven digits; written as 64 bits they would be 17, a quarter of what a user takes."""
        return [float(f"{score:.7g}") for score in scores]


@dataclass(frozen=True)
class RecentEvents:
    """A user's events since the features were materialised.

    Attributes:
        events: Oldest first.
        revision: Number of events that have joined this history so far; orders results of one newest event.
        batch: The batch that changed it last; empty if none has.
    """

    events: list[Event]
    revision: int = 0
    batch: str = ""

    def join(self, events: Iterable[Event], limit: int) -> tuple[RecentEvents, list[Joined]]:
        """This history with more events, the newest `limit` of all, and how each event joined it."""
        by_id = {event.event_id: event for event in self.events}
        newest = self.events[-1].ts if self.events else None
        joined: list[Joined] = []
        for event in events:
            if event.event_id in by_id:
                joined.append("repeated")
                continue
            joined.append("late" if newest is not None and event.ts < newest else "in_order")
            newest = event.ts if newest is None else max(newest, event.ts)
            by_id[event.event_id] = event
        merged = sorted(by_id.values(), key=lambda event: (event.ts, event.event_id))[-limit:]
        return RecentEvents(merged, self.revision, self.batch), joined


@dataclass(frozen=True)
class Commit:
    """What finishes entries of one user.

    Attributes:
        entries: The entries.
        recent: The history that the results were computed from, the entries' events joined.
        results: By task name.
    """

    entries: Sequence[Entry]
    recent: RecentEvents
    results: dict[str, Result]


class UserStore:
    """Reads and writes of one worker.

    Attributes:
        choice: Names what chooses the items of a result beside the release.
    """

    def __init__(self, client: redis.Redis, config: RecallConfig) -> None:
        self._client = client
        self._config = config
        self.choice = name_choice(config)
        self._commit = client.register_script(COMMIT)
        self._renew = client.register_script(RENEW)
        self._fill = client.register_script(FILL)
        self._note_control = client.register_script(NOTE_CONTROL)

    def recent(self, user_ids: list[str]) -> dict[str, RecentEvents]:
        """The recent events of each user; empty for users without any."""
        with self._client.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.hgetall(history_keys(user_id)[1])
            answers: list[Any] = pipe.execute()
        return {user_id: _decode_recent(fields) for user_id, fields in zip(user_ids, answers, strict=True)}

    def erased(self, user_ids: list[str]) -> set[str]:
        """Those of the users, none of whom has recent events, who were erased."""
        with self._client.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.zscore(FORGOTTEN, digest_user(user_id))
            return {user_id for user_id, since in zip(user_ids, pipe.execute(), strict=True) if since is not None}

    def commit(self, commits: Iterable[Commit], *, release: str, order: int, batch: str) -> list[int | None]:
        """Finish entries: events into the histories, results stored, entries out of the stream; all at once per user.

        Args:
            commits: One per user.
            release: Name of the release that computed the results.
            order: Number of its publication.
            batch: Names this batch; no other has the same name.

        Returns:
            For each the number of results stored, without those that are older than what is stored; None if nothing
            happened, because the history or an entry has changed since it was read.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for commit in commits:
                self._queue(pipe, commit, [release, order, f"{time.time():.3f}"], batch)
            return [None if stored < 0 else stored for stored in pipe.execute()]

    def note_control(self, user_id: str) -> None:
        """Remember a user with whom inference has worked, for other workers' failures; not one who was erased."""
        self._note_control(keys=[CONTROL, history_keys(user_id)[0]], args=[user_id, MARK_TTL_SECONDS])

    def renew(
        self, user_ids: Iterable[str], tasks: Sequence[str], order: int, query_tasks: Sequence[str] = ()
    ) -> list[bool]:
        """Whether each user has a result of every task that this publication has computed, by these k and filters.

        Those results are kept from now on for as long as new ones, and with them those of tasks with a query.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                keys = [result_key(user_id, task) for task in (*tasks, *query_tasks)]
                args: list[Any] = [order, self._config.result_ttl_seconds, self.choice, len(tasks)]
                self._renew(keys=keys, args=args, client=pipe)
            return [bool(there) for there in pipe.execute()]

    def fill(
        self, results: Mapping[str, Mapping[str, Result]], recent: Mapping[str, RecentEvents], order: int
    ) -> dict[str, Filled]:
        """Store results that no event has asked for; what an event has brought is never replaced by an older one.

        Args:
            results: By user and task.
            recent: By user, the history that they were computed from.
            order: Number of the release's publication.

        Returns:
            By user: `stored`; `current` if newer results were there; `changed` if nothing happened because the history
            has changed since it was read; `forgotten` if nothing happened because the user was erased; `withdrawn` if
            nothing happened because another publication serves by now.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for user_id, by_task in results.items():
                events, ttl = recent[user_id], self._config.result_ttl_seconds
                newest_us = events.events[-1].ts_us if events.events else 0
                self._fill(
                    keys=[
                        *(history_keys(user_id)[1], FORGOTTEN, SERVING),
                        *(result_key(user_id, task) for task in by_task),
                    ],
                    args=[
                        *(events.batch, digest_user(user_id), newest_us, events.revision, order, ttl, self.choice),
                        *(result.model_dump_json() for result in by_task.values()),
                    ],
                    client=pipe,
                )
            answers = dict(zip(results, pipe.execute(), strict=True))
        names: dict[int, Filled] = {-3: "withdrawn", -2: "forgotten", -1: "changed", 0: "current"}
        return {user_id: names.get(answer, "stored") for user_id, answer in answers.items()}

    def result(self, user_id: str, task: str) -> Result | None:
        """The stored result, or None."""
        body: Any = self._client.hget(result_key(user_id, task), "body")
        return None if body is None else Result.model_validate_json(body)

    def _queue(self, pipe: Any, commit: Commit, served: list[Any], batch: str) -> None:
        user_id, config = commit.entries[0].event.user_id, self._config
        events = [entry.event for entry in commit.entries]
        marks = [accepted_key(user_id, event.event_id) for event in events]
        results = [result_key(user_id, task) for task in commit.results]
        limits = [config.history_events, config.history_ttl_seconds, config.result_ttl_seconds]
        rows = [
            part
            for entry in commit.entries
            for part in (entry.entry_id, entry.event.event_id, entry.event.ts_us, encode_event(entry.event))
        ]
        bodies = [result.model_dump_json() for result in commit.results.values()]
        newest: list[Any] = [commit.recent.events[-1].ts_us, len(events), self.choice]
        self._commit(
            keys=[STREAM, *history_keys(user_id), waiting_key(user_id), *marks, *results],
            args=[GROUP, commit.recent.batch, batch, *limits, *served, *newest, *rows, *bodies],
            client=pipe,
        )


def name_choice(config: RecallConfig) -> str:
    """What chooses the items of a result beside the release: a digest of `k` and `filters`; '' for their defaults."""
    chosen = config.model_dump_json(include={"k", "filters"})
    if chosen == RecallConfig().model_dump_json(include={"k", "filters"}):
        return ""
    return hashlib.sha256(chosen.encode()).hexdigest()[:8]


def _decode_recent(fields: dict[str, str]) -> RecentEvents:
    events = []
    for name, text in fields.items():
        if name.startswith("e:"):
            try:
                events.append(decode_event(text))
            except DataError:  # of another version of this software; one event must not cost the user's recall
                log.warning("event of a history cannot be read and is left out")
    events.sort(key=lambda event: (event.ts, event.event_id))
    return RecentEvents(events, int(fields.get("revision", 0)), fields.get("batch", ""))
