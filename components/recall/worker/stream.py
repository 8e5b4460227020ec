"""The recall worker: events in, one inference per user, results out, then the acknowledgement.

Faults and what they cost: a killed worker's entries are claimed by another one after `claim_idle_seconds`; a failing
user is tried again alone, then becomes a dead letter; a lost or full Redis is waited for; SIGTERM finishes the batch at
hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import redis
import structlog

from components.config import RecallConfig
from components.memory import trim_memory
from components.recall.serving.answers import answer_users
from components.recall.serving.context import KnownHistory
from components.recall.serving.engine import ServingRelease
from components.recall.state.lineage import Served
from components.recall.state.store import UserStore
from components.recall.state.stream import Entry, EventStream
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.metrics import StreamMetrics
from components.recall.telemetry.tracing import Tracing
from components.recall.worker.loop import IDLE_BLOCK_MS, ServingLoop
from components.release.publication import Publication, live_workers, send_heartbeat

log = structlog.get_logger()

_MAINTENANCE_SECONDS = 5.0


class RecallWorker(ServingLoop):
    """One consumer of the event stream; `run` returns after SIGTERM, SIGINT or `stop`."""

    metrics: StreamMetrics

    def __init__(
        self,
        client: redis.Redis,
        config: RecallConfig,
        load: Callable[[Publication], ServingRelease],
        name: str | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        """Take a Redis client and the loader of releases.

        Args:
            client: Returns str.
            config: Sizes and limits.
            load: Loads and checks a release; may raise anything.
            name: Unique among live workers; host and process id if left out.
            tracing: Where spans go; nowhere if left out.
        """
        super().__init__(client, load, name, StreamMetrics())
        self._config = config
        self._stream = EventStream(client, self.name, config)
        self._store = UserStore(client, config)
        self._tracing = tracing or Tracing()
        self._batches = 0
        self._next_maintenance = 0.0

    def step(self) -> None:
        """One iteration: heartbeat, releases, claims, new events."""
        try:
            release = self._follow_release()
            self._maintain()
            if release is None:
                self._sleep(IDLE_BLOCK_MS / 1000)  # events wait in the stream
                return
            stale = self._stream.claim_stale(self._config.batch_size)
            if stale:
                self._retry(release, stale)
            # While claims keep coming, new events are not waited for.
            # No more than one batch, so that other workers find some; what else waits of its users comes along.
            entries = self._stream.read(self._config.batch_size, 1 if stale else IDLE_BLOCK_MS)
            if entries:
                self._process(release, entries + self._stream.read_ahead(entries))
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):
                raise
            log.warning("consumer group is gone, creating it again")  # a Redis that lost its memory
            self._stream.ensure_group()

    def _process(self, release: ServingRelease, entries: list[Entry]) -> None:
        """Infer and store a batch; if that fails, each user alone, and who fails again stays pending for a retry."""
        try:
            self._infer_and_store(release, entries)
        except redis.RedisError:
            raise
        except Exception as error:  # a user's data broke the model: the others must not suffer
            if len({entry.event.user_id for entry in entries}) > 1:
                for single in _batches_of_users(entries, 1):
                    self._process(release, single)
                return
            self._fail(release, entries, error)

    def _retry(self, release: ServingRelease, entries: list[Entry]) -> None:
        """Entries that were delivered before go one user at a time: one of them may have killed a worker."""
        for single in _batches_of_users(entries, 1):
            begun = self._stream.begin(single)
            exhausted = [entry for entry in begun if entry.deliveries > self._config.max_deliveries]
            self._give_up(exhausted, "delivered too often without a result: a worker died or failed each time")
            self._process(release, [entry for entry in begun if entry not in exhausted])

    def _fail(self, release: ServingRelease, entries: list[Entry], error: Exception) -> None:
        """Leave a user's entries pending for a retry; those that had their last one are told apart."""
        reason = f"{type(error).__name__}: {error}"
        exhausted = [entry for entry in entries if entry.deliveries >= self._config.max_deliveries]
        for entry in entries:
            if entry not in exhausted:
                self.metrics.events.labels(outcome="failed").inc()
                log.warning(
                    "event failed", event_id=entry.event.event_id, deliveries=entry.deliveries, error=name_error(error)
                )
        if exhausted:
            self._tell_apart(release, exhausted, reason)

    def _tell_apart(self, release: ServingRelease, entries: list[Entry], reason: str) -> None:
        """Of a user's events that fail together, give up those that fail when added one by one, oldest first.

        The culprit may be an event that has tries left, or is another worker's; so every unfinished event is left out.
        """
        unfinished = self._stream.unfinished(entries[0].event.user_id) | {entry.event.event_id for entry in entries}
        if len(unfinished) == 1:
            self._give_up(entries, reason)
            return
        for entry in sorted(entries, key=lambda one: one.event.ts):
            unfinished.discard(entry.event.event_id)
            try:
                self._infer_and_store(release, [entry], without=unfinished)
            except redis.RedisError:
                raise
            except Exception as error:  # as in _process
                self._give_up([entry], f"{type(error).__name__}: {error}")

    def _give_up(self, entries: list[Entry], reason: str) -> None:
        for entry in entries:
            text = entry.event.model_dump_json()
            if self._stream.give_up(entry.entry_id, text, reason, entry.deliveries, entry.event):
                self.metrics.events.labels(outcome="dead").inc()

    def _infer_and_store(
        self, release: ServingRelease, entries: list[Entry], without: Collection[str] = frozenset()
    ) -> None:
        if not entries:
            return
        send_heartbeat(self._client, self.name, release.name)
        self._batches += 1
        batch = f"{self.name}/{self._batches}"
        with self._tracing.batch([entry.traceparent for entry in entries], batch=batch, release=release.name):
            entries, num_users = self._answer(release, entries, batch, without)
        trim_memory()
        self._count(release, entries, num_users)
        log.info("batch", batch=batch, events=len(entries), users=num_users, release=release.name)

    def _answer(
        self, release: ServingRelease, entries: list[Entry], batch: str, without: Collection[str]
    ) -> tuple[list[Entry], int]:
        """Make and store the results of a batch, then acknowledge it.

        Returns:
            Its entries that are finished by this, and the number of users. Another worker may have finished or given up
            the others, or Redis may have lost what was remembered of them, so that they stay pending.
        """
        with self._timed("history"):
            entries = self._remember(entries)
            recent = self._store.recent(list(dict.fromkeys(entry.event.user_id for entry in entries)), without)
            known = release.read_histories(list(recent))
        with self._timed("inference"):
            tokens_before = release.num_tokens
            results = answer_users(release, known, recent, self._config.k)
            self.metrics.tokens.inc(release.num_tokens - tokens_before)
        with self._timed("store"):
            for user, by_task in results.items():
                stored = self._store.store(user, by_task, order=release.order, revision=recent[user].revision)
                self.metrics.results.labels(outcome="stored").inc(stored)
                self.metrics.results.labels(outcome="older").inc(len(by_task) - stored)
            revisions = {user: one.revision for user, one in recent.items()}
            entries = self._stream.acknowledge(entries, Served(batch, release.name, revisions))
        # Nothing is known of a user whose live history is empty by now: given up elsewhere, or crowded out.
        late = [one for one in entries if one.event.ts_us < known.get(one.event.user_id, KnownHistory()).as_of_us]
        self.metrics.late_events.inc(len(late))
        return entries, len(recent)

    def _remember(self, entries: list[Entry]) -> list[Entry]:
        """Take the events into their users' histories; returns the entries that are still there to be answered."""
        kept = []
        for entry, how in zip(entries, self._store.remember(entries), strict=True):
            if how != "gone":
                self.metrics.joined.labels(how=how).inc()
                kept.append(entry)
        return kept

    def _count(self, release: ServingRelease, entries: list[Entry], num_users: int) -> None:
        now = time.time()
        for entry in entries:
            if entry.accepted_at == entry.accepted_at:  # not NaN
                self.metrics.event_to_visible_seconds.observe(max(0.0, now - entry.accepted_at))
        items = [entry.event.item_id for entry in entries if entry.event.item_id is not None]
        self.metrics.unknown_items.inc(release.count_unknown(items))
        self.metrics.events.labels(outcome="done").inc(len(entries))
        self.metrics.inferences.inc(num_users)
        self.metrics.batch_users.observe(num_users)

    def _maintain(self) -> None:
        """Periodic maintenance: consumers of dead workers, gauges."""
        if time.monotonic() < self._next_maintenance:
            return
        self._next_maintenance = time.monotonic() + _MAINTENANCE_SECONDS
        self._stream.ensure_group()
        self._stream.forget_dead_consumers(live_workers(self._client))
        entries, pending, dead = self._stream.counts()
        memory: Any = self._client.info("memory")
        self.metrics.redis_memory.set(memory["used_memory"])
        self.metrics.redis_memory_limit.set(memory["maxmemory"])
        self.metrics.stream_entries.set(entries)
        self.metrics.lag_entries.set(max(0, entries - pending))
        self.metrics.oldest_entry_age.set(self._stream.oldest_age_seconds())
        self.metrics.pending_entries.set(pending)
        self.metrics.dead_letters.set(dead)
        self.metrics.export_gauges()

    def _leave_queue(self) -> None:
        self._stream.leave()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        with self._tracing.part(part), self.metrics.stage_seconds.labels(part=part).time():
            yield


def _batches_of_users(entries: list[Entry], num_users: int) -> Iterator[list[Entry]]:
    """Batches of at most so many users, each with all of its entries."""
    by_user: dict[str, list[Entry]] = {}
    for entry in entries:
        by_user.setdefault(entry.event.user_id, []).append(entry)
    groups = list(by_user.values())
    for start in range(0, len(groups), num_users):
        yield [entry for group in groups[start : start + num_users] for entry in group]
