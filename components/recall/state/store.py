"""What the worker keeps in Redis for a user: the recent events, and one result per task."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import redis
from pydantic import BaseModel, ConfigDict

from components.config import RecallConfig
from components.recall.state.events import Event, to_microseconds
from components.recall.state.scripts import REMEMBER, STORE, STREAM, history_keys, result_key
from components.recall.state.stream import Entry

Joined = Literal["repeated", "in_order", "late", "gone"]
_JOINED: tuple[Joined, ...] = ("repeated", "in_order", "late", "gone")  # by the answer of REMEMBER


class Result(BaseModel):
    """Content of a stored result.

    Attributes:
        item_ids: Best first.
        scores: Parallel to item_ids.
        release: Release that computed it.
        event_id: The user's newest event when it was computed.
        event_ts: When that event happened.
        computed_at: When the result was computed.
        query: The words it answers, for tasks that need them.
    """

    model_config = ConfigDict(frozen=True)

    item_ids: list[int]
    scores: list[float]
    release: str
    event_id: str
    event_ts: datetime
    computed_at: datetime
    query: str | None = None


@dataclass(frozen=True)
class RecentEvents:
    """A user's events since the features were materialised.

    Attributes:
        events: Oldest first.
        revision: Number of changes of this history, less the events left out; orders results of one newest event.
    """

    events: list[Event]
    revision: int


class UserStore:
    """Reads and writes of one worker; every write is atomic in Redis and safe to repeat."""

    def __init__(self, client: redis.Redis, config: RecallConfig) -> None:
        self._client = client
        self._config = config
        self._remember = client.register_script(REMEMBER)
        self._store = client.register_script(STORE)

    def remember(self, entries: Iterable[Entry]) -> list[Joined]:
        """Add events to their users' recent histories; an event that is there already changes nothing.

        Returns:
            How the event of each entry joined; "gone" if it did not, because a worker has finished the entry or given
            it up.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for entry in entries:
                event = entry.event
                self._remember(
                    keys=[STREAM, *history_keys(event.user_id)],
                    args=[
                        entry.entry_id,
                        event.event_id,
                        event.ts_us,
                        event.model_dump_json(),
                        self._config.history_events,
                        self._config.result_ttl_seconds,
                    ],
                    client=pipe,
                )
            return [_JOINED[answer] for answer in pipe.execute()]

    def recent(self, user_ids: list[str], without: Collection[str] = frozenset()) -> dict[str, RecentEvents]:
        """The recent events of each user, but for those of the ids given; users without any are left out."""
        with self._client.pipeline(transaction=False) as pipe:
            for user_id in user_ids:
                pipe.hgetall(history_keys(user_id)[1])
            answers: list[Any] = pipe.execute()
        found = {user_id: _decode_recent(fields, without) for user_id, fields in zip(user_ids, answers, strict=True)}
        return {user_id: recent for user_id, recent in found.items() if recent.events}

    def store(self, user_id: str, results: dict[str, Result], *, order: int, revision: int) -> int:
        """Store a user's results by task, all at once; one that is older than what is stored is dropped.

        Args:
            user_id: The user.
            results: By task name.
            order: Number of the release's publication.
            revision: Revision of the history that the results were computed from.

        Returns:
            Number stored.
        """
        with self._client.pipeline(transaction=True) as pipe:
            for task, result in results.items():
                self._store(
                    keys=[result_key(user_id, task)],
                    args=[
                        to_microseconds(result.event_ts),
                        revision,
                        order,
                        result.model_dump_json(),
                        self._config.result_ttl_seconds,
                    ],
                    client=pipe,
                )
            return sum(pipe.execute())

    def result(self, user_id: str, task: str) -> Result | None:
        """The stored result, or None."""
        body: Any = self._client.hget(result_key(user_id, task), "body")
        return None if body is None else Result.model_validate_json(body)


def _decode_recent(fields: dict[str, str], without: Collection[str]) -> RecentEvents:
    left_out = fields.keys() & {f"e:{event_id}" for event_id in without}
    kept = fields.keys() - left_out - {"revision"}
    events = [Event.model_validate_json(fields[field]) for field in kept]
    events.sort(key=lambda event: (event.ts, event.event_id))
    # What leaves events out knows less than what does not, so its result must not replace that of the whole history.
    return RecentEvents(events=events, revision=int(fields.get("revision", 0)) - len(left_out))
