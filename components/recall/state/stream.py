"""The event stream as one worker sees it: read, claim from dead workers, hand back, give up with a reason.

Delivery is at least once: an entry stays pending until its result is stored, whoever dies meanwhile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import redis
import structlog

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.state.events import VERSION, Event, decode_event, encode_event
from components.recall.state.scripts import (
    CLAIM_STALE,
    DEAD_STREAM,
    FORGET_CONSUMER,
    GIVE_UP,
    GROUP,
    STREAM,
    accepted_key,
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
        accepted_at: Seconds since 1970 at which the stream took it; NaN if unknown.
        deliveries: Number of tries, this one included.
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
        self._idle_ms = int(config.claim_idle_seconds * 1000)
        self._oldest_ms = 0
        self._claim_from = "0-0"
        self._claim = client.register_script(CLAIM_STALE)
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
        return self._decode(entries)

    def read_ahead(self, entries: list[Entry]) -> list[Entry]:
        """What else waits of the same users, however far down the stream: undelivered, or left by a dead worker.

        The entries become ours as if they had been read; if they are still unfinished when the group's reading comes to
        them, they are delivered once more.
        """
        return self._take_along(entries, tries=1)

    def claim_stale(self, count: int) -> list[Entry]:
        """Take over entries that no consumer has finished for `claim_idle_seconds`, our own failed ones too.

        With them comes what else waits of their users, so that one inference covers it. None counts as delivered yet:
        an entry that kills its worker must not use up the tries of those behind it. One call looks at a part of what is
        pending, the next call goes on from there, so that no number of young entries hides an old one.
        """
        answer: Any = self._claim(keys=[STREAM], args=[GROUP, self._consumer, self._idle_ms, self._claim_from, count])
        self._claim_from, ids = answer[:2]
        stale = self._load(ids)
        return stale + self._take_along(stale, tries=0)

    def begin(self, entries: list[Entry]) -> list[Entry]:
        """Count claimed entries as delivered, just before they are tried; those that were finished meanwhile go."""
        ids: list[Any] = [entry.entry_id for entry in entries]
        begun: Any = self._client.xclaim(STREAM, GROUP, self._consumer, min_idle_time=0, message_ids=ids)
        still_there = {entry_id for entry_id, _ in begun}
        return [entry for entry in entries if entry.entry_id in still_there]

    def hand_back(self, entries: list[Entry]) -> None:
        """Leave unfinished entries to other workers at once, this try not counted."""
        with self._client.pipeline(transaction=False) as pipe:
            for entry in entries:
                pipe.xclaim(
                    STREAM, GROUP, self._consumer, min_idle_time=0, message_ids=[entry.entry_id], idle=self._idle_ms,
                    retrycount=entry.deliveries - 1, justid=True,
                )  # fmt: skip
            pipe.execute()

    def still_there(self, entries: list[Entry]) -> list[Entry]:
        """Those that no worker has finished or given up."""
        with self._client.pipeline(transaction=False) as pipe:
            for entry in entries:
                pipe.xrange(STREAM, entry.entry_id, entry.entry_id)
            return [entry for entry, found in zip(entries, pipe.execute(), strict=True) if found]

    def give_up(self, entry: Entry, reason: str) -> bool:
        """Move an entry to the dead letters, with the reason.

        Returns:
            Whether it was moved; not if another worker has finished it or given it up.
        """
        return self._bury(entry.entry_id, encode_event(entry.event), reason, entry.deliveries, entry.event)

    def _bury(self, entry_id: str, text: str, reason: str, deliveries: int, event: Event | None = None) -> bool:
        letter = {
            "event": text,
            "version": str(VERSION),
            "reason": reason,
            "deliveries": str(deliveries),
            "entry_id": entry_id,
            "consumer": self._consumer,
            "at": f"{time.time():.3f}",
        }
        fields = [part for pair in letter.items() for part in pair]
        of_event = [accepted_key(event.user_id, event.event_id), waiting_key(event.user_id)] if event else []
        moved = self._give_up(keys=[STREAM, DEAD_STREAM, *of_event], args=[GROUP, entry_id, letter["at"], *fields])
        if moved:  # the reason may quote the event, so it stands in the letter alone
            event_id = event.event_id if event else None
            log.warning("dead letter", entry_id=entry_id, event_id=event_id, deliveries=deliveries)
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
        try:
            self._forget_consumer(keys=[STREAM], args=[GROUP, self._consumer, 0])
        except redis.ResponseError as error:
            if not is_group_gone(error):  # with the group, the consumer is gone, too
                raise

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
        self._oldest_ms = int(entries[0][0].split("-")[0]) if entries else seconds * 1000
        return float(max(0.0, seconds + microseconds / 1e6 - self._oldest_ms / 1000)) if entries else 0.0

    def _read(self, start: str, count: int, block_ms: int | None) -> list[tuple[str, dict[str, str]]]:
        answer: Any = self._client.xreadgroup(GROUP, self._consumer, {STREAM: start}, count=count, block=block_ms)
        if not answer:
            return []
        streams = answer.values() if isinstance(answer, dict) else [entries for _, entries in answer]
        return [(entry_id, fields) for entries in streams for entry_id, fields in entries]

    def _waiting(self, entries: list[Entry]) -> list[str]:
        """Ids of what else waits of the users of these entries; bounded by `max_waiting_per_user` each."""
        users = list(dict.fromkeys(entry.event.user_id for entry in entries))
        with self._client.pipeline(transaction=False) as pipe:
            for user_id in users:
                # Notes of entries older than the stream's oldest are void: those were deleted by hand.
                pipe.zremrangebyscore(waiting_key(user_id), "-inf", f"({self._oldest_ms}")
                pipe.zrange(waiting_key(user_id), 0, self._config.max_waiting_per_user - 1)
            answers = pipe.execute(raise_on_error=False)[1::2]
        known = {entry.entry_id for entry in entries}
        # A note is a hint: where it cannot be read, each entry comes in its turn.
        lists = [of_user for of_user in answers if isinstance(of_user, list)]
        return [entry_id for of_user in lists for entry_id in of_user if entry_id not in known]

    def _take_along(self, entries: list[Entry], tries: int) -> list[Entry]:
        """Claim what else waits of the users of these entries; of what was undelivered, so many tries count as made."""
        ids = self._waiting(entries)
        if not ids:
            return []
        claim: Callable[..., Any] = self._client.xclaim
        stale = claim(STREAM, GROUP, self._consumer, self._idle_ms, ids, justid=True)
        unread = claim(STREAM, GROUP, self._consumer, _NEVER_MS, ids, force=True, retrycount=tries)
        return self._load(stale) + self._decode([entry for entry in unread if entry != (None, None)])

    def _load(self, ids: list[str]) -> list[Entry]:
        """Read claimed entries, with the number of their tries, the coming one included."""
        if not ids:
            return []
        with self._client.pipeline(transaction=False) as pipe:
            for entry_id in ids:
                pipe.xrange(STREAM, entry_id, entry_id)
            for entry_id in ids:
                pipe.xpending_range(STREAM, GROUP, min=entry_id, max=entry_id, count=1)
            answers: list[Any] = pipe.execute()
        found = [entry for entries in answers[: len(ids)] for entry in entries]
        pending = [row for rows in answers[len(ids) :] for row in rows]
        deleted = set(ids) - {entry_id for entry_id, _ in found}
        if deleted:  # by hand; nothing is left to do
            self._client.xack(STREAM, GROUP, *deleted)
        return self._decode(found, {row["message_id"]: int(row["times_delivered"]) + 1 for row in pending})

    def _decode(self, raw: list[tuple[str, dict[str, str]]], deliveries: dict[str, int] | None = None) -> list[Entry]:
        """Parse entries; what never can be parsed becomes a dead letter at once.

        An entry of a newer version stays pending, for a worker of that version.
        """
        entries = []
        for entry_id, fields in raw:
            times = (deliveries or {}).get(entry_id, 1)
            text, version = fields.get("event", ""), fields.get("version", "1")
            if version.isdecimal() and int(version) > VERSION:
                log.warning("entry of a newer version is left to newer workers", entry_id=entry_id, version=version)
                continue
            try:
                accepted_at = _seconds(fields.get("accepted_at", ""))
                entries.append(Entry(entry_id, decode_event(text), accepted_at, times, fields.get("traceparent", "")))
            except DataError as error:
                self._bury(entry_id, text, str(error), times)
        return entries


def is_group_gone(error: redis.ResponseError) -> bool:
    """Whether Redis answers that the stream or its consumer group is not there: it has lost its memory, or not begun.

    Reading says NOGROUP, XINFO "no such key".
    """
    return any(words in str(error) for words in ("NOGROUP", "no such key"))


def _seconds(text: str) -> float:
    """The number, or NaN: an event is no worse for not saying when it was accepted."""
    try:
        seconds = float(text)
    except ValueError:
        return math.nan
    return seconds if math.isfinite(seconds) else math.nan
