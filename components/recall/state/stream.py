"""The event stream as one worker sees it: read, acknowledge, claim from the dead, give up with a reason.

Delivery is at least once: an entry stays pending until its result is stored, whoever dies meanwhile.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import redis
import structlog

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.state.events import Event, decode_event
from components.recall.state.lineage import Served, done_fields
from components.recall.state.scripts import (
    DEAD_STREAM,
    FINISH,
    FORGET_CONSUMER,
    GIVE_UP,
    GROUP,
    STREAM,
    accepted_key,
    history_keys,
    waiting_key,
)

log = structlog.get_logger()
_NEVER_MS = 2**40  # no entry has been idle for so long: none is taken from another consumer


@dataclass(frozen=True)
class Entry:
    """One delivery of one event.

    Attributes:
        entry_id: Id in the stream.
        event: The event.
        accepted_at: Seconds since 1970 at which the stream took it; NaN if it was not said.
        deliveries: How often it was delivered, this time included.
        traceparent: Trace that it belongs to, as W3C writes it; empty if there is none.
    """

    entry_id: str
    event: Event
    accepted_at: float
    deliveries: int
    traceparent: str = ""


class EventStream:
    """A consumer of the group; the name must be unique among live workers."""

    def __init__(self, client: redis.Redis, consumer: str, config: RecallConfig) -> None:
        self._client = client
        self._consumer = consumer
        self._config = config
        self._finish = client.register_script(FINISH)
        self._give_up = client.register_script(GIVE_UP)
        self._forget_consumer = client.register_script(FORGET_CONSUMER)

    def ensure_group(self) -> None:
        """Make the stream and its consumer group if they are not there."""
        try:
            self._client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if "BUSYGROUP" not in str(error):
                raise

    def read(self, count: int, block_ms: int) -> list[Entry]:
        """New entries, at most `count`; waits at most `block_ms` for the first and `max_wait_ms` for more."""
        entries = self._read(">", count, block_ms)
        if entries and len(entries) < count:
            time.sleep(self._config.max_wait_ms / 1000)
            entries += self._read(">", count - len(entries), None)
        return self._decode(entries, {})

    def read_ahead(self, entries: list[Entry]) -> list[Entry]:
        """What else waits of the same users, however far down the stream and not yet delivered to anybody.

        At most `history_events` a user, oldest first. They become ours as if they had been read; if they are still
        unfinished when the group's reading comes to them, they are delivered once more.
        """
        users = list(dict.fromkeys(entry.event.user_id for entry in entries))
        with self._client.pipeline(transaction=False) as pipe:
            for user_id in users:
                pipe.hkeys(waiting_key(user_id))
            waiting: list[list[str]] = pipe.execute()
        known = {entry.entry_id for entry in entries}
        ids: list[Any] = []
        for of_user in waiting:
            ids += sorted((one for one in of_user if one not in known), key=_place)[: self._config.history_events]
        if not ids:
            return []
        taken: Any = self._client.xclaim(
            STREAM, GROUP, self._consumer, min_idle_time=_NEVER_MS, message_ids=ids, retrycount=1, force=True
        )
        return self._decode([(entry_id, fields) for entry_id, fields in taken if fields], {})

    def unfinished(self, user_id: str) -> set[str]:
        """Event ids of the user's entries in the stream, as far as it is known: a replayed one is not."""
        events: Any = self._client.hvals(waiting_key(user_id))
        return set(events)

    def claim_stale(self, count: int) -> list[Entry]:
        """Take over entries that no consumer has finished for `claim_idle_seconds`, our own failed ones too.

        None counts as delivered yet: an entry that kills its worker must not use up the tries of those behind it.
        """
        idle_ms = int(self._config.claim_idle_seconds * 1000)
        ids: Any = self._client.xautoclaim(
            STREAM, GROUP, self._consumer, min_idle_time=idle_ms, count=count, justid=True
        )
        if not ids:
            return []
        with self._client.pipeline(transaction=False) as pipe:
            for entry_id in ids:
                pipe.xrange(STREAM, entry_id, entry_id)
            answers: list[Any] = pipe.execute()
        return self._decode([entry for found in answers for entry in found], self._deliveries(ids))

    def begin(self, entries: list[Entry]) -> list[Entry]:
        """Count claimed entries as delivered, just before they are tried; those that were finished meanwhile go."""
        ids: list[Any] = [entry.entry_id for entry in entries]
        begun: Any = self._client.xclaim(STREAM, GROUP, self._consumer, min_idle_time=0, message_ids=ids)
        still_there = {entry_id for entry_id, _ in begun}
        return [entry for entry in entries if entry.entry_id in still_there]

    def acknowledge(self, entries: list[Entry], served: Served) -> list[Entry]:
        """Take finished entries out of the stream, and note in their lineage what they were finished with.

        Returns:
            Those taken out. Of the others, some were finished or given up by another worker; some stay pending and are
            tried again, since Redis has restarted without its newest writes and the history without the event.
        """
        with self._client.pipeline(transaction=False) as pipe:
            for entry in entries:
                user_id, event_id = entry.event.user_id, entry.event.event_id
                known: list[str | int] = [event_id, self._config.history_events, served.revisions.get(user_id, 0)]
                self._finish(
                    keys=[STREAM, *history_keys(user_id), accepted_key(user_id, event_id), waiting_key(user_id)],
                    args=[GROUP, entry.entry_id, *known, *done_fields(served, user_id)],
                    client=pipe,
                )
            finished: list[int] = pipe.execute()
        return [entry for entry, done in zip(entries, finished, strict=True) if done]

    def give_up(self, entry_id: str, text: str, reason: str, deliveries: int, event: Event | None = None) -> bool:
        """Move an entry to the dead letters, with the reason, and its event out of the history, all at once.

        Args:
            entry_id: Id in the stream.
            text: The entry's content, to be replayed.
            reason: Why.
            deliveries: How often it was tried.
            event: The content as an event, if it is one.

        Returns:
            Whether it was moved; not if another worker has finished it or given it up.
        """
        letter = {
            "event": text,
            "reason": reason,
            "deliveries": str(deliveries),
            "entry_id": entry_id,
            "consumer": self._consumer,
            "at": f"{time.time():.3f}",
        }
        fields = [part for pair in letter.items() for part in pair]
        event_id, of_event = "", []
        if event:
            event_id = event.event_id
            of_event = [*history_keys(event.user_id), accepted_key(event.user_id, event_id), waiting_key(event.user_id)]
        arguments = [GROUP, entry_id, event_id, letter["at"], *fields]
        moved = self._give_up(keys=[STREAM, DEAD_STREAM, *of_event], args=arguments)
        if moved:  # the reason may quote the event, so it stands in the letter alone
            log.warning("dead letter", entry_id=entry_id, event_id=event_id or None, deliveries=deliveries)
        return bool(moved)

    def forget_dead_consumers(self, live: set[str]) -> None:
        """Remove consumers that are gone and have nothing pending."""
        consumers: Any = self._client.xinfo_consumers(STREAM, GROUP)
        for consumer in consumers:
            if consumer["name"] not in live:
                idle_ms = int(10_000 * self._config.claim_idle_seconds)
                self._forget_consumer(keys=[STREAM], args=[GROUP, consumer["name"], idle_ms])

    def leave(self) -> None:
        """Remove this consumer if it leaves nothing pending behind."""
        self._forget_consumer(keys=[STREAM], args=[GROUP, self._consumer, 0])

    def counts(self) -> tuple[int, int, int]:
        """Entries in the stream, entries delivered but not acknowledged, dead letters."""
        with self._client.pipeline(transaction=False) as pipe:
            pipe.xlen(STREAM)
            pipe.xpending(STREAM, GROUP)
            pipe.xlen(DEAD_STREAM)
            length, pending, dead = pipe.execute()
        return int(length), int(pending["pending"]), int(dead)

    def oldest_age_seconds(self) -> float:
        """Age of the oldest entry not yet finished, by the clock of Redis; 0 if there is none."""
        with self._client.pipeline(transaction=True) as pipe:
            pipe.xrange(STREAM, count=1)
            pipe.time()
            entries, (seconds, microseconds) = pipe.execute()
        if not entries:
            return 0.0
        return float(max(0.0, seconds + microseconds / 1e6 - int(entries[0][0].split("-")[0]) / 1000))

    def _read(self, start: str, count: int, block_ms: int | None) -> list[tuple[str, dict[str, str]]]:
        answer: Any = self._client.xreadgroup(GROUP, self._consumer, {STREAM: start}, count=count, block=block_ms)
        if not answer:
            return []
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer]
        return [(entry_id, fields) for entries in streams for entry_id, fields in entries]

    def _deliveries(self, ids: list[str]) -> dict[str, int]:
        """How often each will have been delivered with the try to come."""
        with self._client.pipeline(transaction=False) as pipe:
            for entry_id in ids:
                pipe.xpending_range(STREAM, GROUP, min=entry_id, max=entry_id, count=1)
            answers: list[Any] = pipe.execute()
        return {row["message_id"]: int(row["times_delivered"]) + 1 for rows in answers for row in rows}

    def _decode(self, raw: list[tuple[str, dict[str, str]]], deliveries: dict[str, int]) -> list[Entry]:
        """Parse entries; what never can be parsed becomes a dead letter at once."""
        entries = []
        for entry_id, fields in raw:
            times = deliveries.get(entry_id, 1)
            text = fields.get("event", "")
            try:
                accepted_at = _seconds(fields.get("accepted_at", ""))
                entries.append(Entry(entry_id, decode_event(text), accepted_at, times, fields.get("traceparent", "")))
            except DataError as error:
                self.give_up(entry_id, text, str(error), times)
        return entries


def _seconds(text: str) -> float:
    """The number, or NaN: an event is no worse for not saying when it was accepted."""
    try:
        seconds = float(text)
    except ValueError:
        return math.nan
    return seconds if math.isfinite(seconds) else math.nan


def _place(entry_id: str) -> tuple[int, int]:
    """Sorts ids by their place in the stream."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
