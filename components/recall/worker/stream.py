"""The recall worker: events in, one inference per user, then events, results and acknowledgement in one commit.

The results of a user are computed from the history as it would be with the new events, and committed only if nothing
has changed since (`state/store.py`); else they are computed again. So an event comes into the history only once an
inference has succeeded with it (ADR 22).

Faults and what they cost: a killed worker's entries are claimed by another one after `claim_idle_seconds`; a failing
batch is halved until the event at fault is alone, which is tried again and then becomes a dead letter; a worker at
which everything fails hands its entries back and ends; an unavailable Redis is waited for; SIGTERM finishes the
current batch.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any

import redis
import structlog

from components.config import RecallConfig
from components.memory import trim_memory
from components.recall.serving.answers import answer_users
from components.recall.serving.context import KnownHistory
from components.recall.serving.engine import ServingRelease
from components.recall.state.scripts import CONTROL
from components.recall.state.store import Commit, Joined, RecentEvents, UserStore
from components.recall.state.stream import Entry, EventStream, is_group_gone
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.metrics import StreamMetrics
from components.recall.telemetry.tracing import Tracing
from components.recall.worker.loop import IDLE_BLOCK_MS, MakeSource, ServingLoop, SickWorkerError, require_health
from components.recall.worker.source import Load
from components.recall.worker.switch import ReleaseSwitch
from components.redis_client import is_unavailable, require_no_eviction
from components.release.publication import live_workers, send_heartbeat

log = structlog.get_logger()

_MAINTENANCE_SECONDS = 5.0


class RecallWorker(ServingLoop):
    """One consumer of the event stream; `run` returns after SIGTERM, SIGINT or `stop`."""

    metrics: StreamMetrics

    def __init__(
        self,
        client: redis.Redis,
        config: RecallConfig,
        load: Load,
        name: str | None = None,
        tracing: Tracing | None = None,
        source: MakeSource = ReleaseSwitch,
    ) -> None:
        """Take what a `ServingLoop` takes, sizes and limits, and where spans go (nowhere if left out)."""
        super().__init__(client, load, name, StreamMetrics(), source)
        self._config = config
        self._stream = EventStream(client, self.name, config)
        self._store = UserStore(client, config)
        self._tracing = tracing or Tracing()
        self._batches = 0
        self._in_hand: list[Entry] = []
        self._control = ""  # the user with whom this worker succeeded last, until Redis has it
        self._next_maintenance = 0.0
        self._checked = False

    def step(self) -> None:
        """One iteration: heartbeat, releases, claims, new events."""
        self._in_hand = []
        try:
            release = self._follow_release()
            self._maintain()
            if release is None:
                self._sleep(IDLE_BLOCK_MS / 1000)  # events wait in the stream
                return
            stale = self._stream.claim_stale(self._config.batch_size)
            self._in_hand = stale
            self._retry(release, stale)
            # While claims keep coming, new events are not waited for.
            # No more than one batch, so that other workers find some; what else waits of its users comes along.
            entries = self._stream.read(self._config.batch_size, 1 if stale else IDLE_BLOCK_MS)
            if entries:
                self._in_hand = entries + self._stream.read_ahead(entries)
                tried = {entry.event.user_id for entry in self._in_hand if entry.deliveries > 1}
                self._process(release, [one for one in self._in_hand if one.event.user_id not in tried])
                self._retry(release, [one for one in self._in_hand if one.event.user_id in tried])
        except redis.RedisError as error:
            if isinstance(error, redis.ResponseError) and is_group_gone(error):
                log.warning("consumer group is gone, creating it again")  # a Redis that lost its memory
                self._stream.ensure_group()
                return
            if is_unavailable(error):  # a server's fault, be it the feature store's: no try of these events
                with suppress(redis.RedisError):
                    self._stream.hand_back(self._in_hand)
            raise
        except SickWorkerError:
            self._stream.hand_back(self._in_hand)
            raise

    def _retry(self, release: ServingRelease, entries: list[Entry]) -> None:
        """Entries that were delivered before go one user at a time: one of them may have killed a worker.

        At its last try an entry goes alone, so that those beside it are not given up with it.
        """
        last = self._config.max_deliveries
        groups = [[entry] for entry in entries if entry.deliveries >= last]
        groups += _by_user([entry for entry in entries if entry.deliveries < last])
        for group in groups:
            if self._stopping:
                return  # the rest is not begun; another worker claims it
            begun = self._stream.begin(group)
            for entry in begun:
                if entry.deliveries > last:
                    self._give_up(entry, "delivered too often without a result: a worker died or failed each time")
            self._process(release, [entry for entry in begun if entry.deliveries <= last])

    def _process(self, release: ServingRelease, entries: list[Entry]) -> None:
        """Infer and commit a batch; if that fails, its halves, down to the event at fault.

        Raises:
            SickWorkerError: The fault is this worker's.
        """
        if not entries:
            return
        failure = self._try(release, entries)
        if failure is None:
            return
        if len(entries) == 1:
            self._judge(release, entries[0], failure)
            return
        for half in _halve(entries):
            if not self._stopping:
                self._process(release, half)

    def _try(self, release: ServingRelease, entries: list[Entry]) -> Exception | None:
        """Infer and commit a batch; the error, if it may be an event's fault."""
        try:
            self._infer_and_commit(release, entries)
        except Exception as error:  # whatever an event or a broken worker makes the libraries raise
            if is_unavailable(error):
                raise
            return error
        return None

    def _judge(self, release: ServingRelease, entry: Entry, error: Exception) -> None:
        """Count a failure against its event if this worker can answer for others; else it is the worker's.

        Raises:
            SickWorkerError: It fails with a made-up user, too, or with one with whom a worker has just succeeded.
        """
        user: Any = self._client.get(CONTROL)
        control: dict[str, RecentEvents] = {}
        with suppress(redis.ResponseError):  # a broken key of that user says nothing of this worker
            control = self._store.recent([user]) if user else {}
        require_health(release, control, error)
        if entry.deliveries >= self._config.max_deliveries:
            self._give_up(entry, f"{type(error).__name__}: {error}")
        else:
            self.metrics.events.labels(outcome="failed").inc()
            event_id, tries = entry.event.event_id, entry.deliveries
            log.warning("event failed", event_id=event_id, deliveries=tries, error=name_error(error))

    def _give_up(self, entry: Entry, reason: str) -> None:
        if self._stream.give_up(entry, reason):
            self.metrics.events.labels(outcome="dead").inc()

    def _infer_and_commit(self, release: ServingRelease, entries: list[Entry]) -> None:
        """Answer a batch; users whose history has changed meanwhile are answered again."""
        while entries:
            send_heartbeat(self._client, self.name, release.name)
            self._batches += 1
            batch = f"{self.name}/{self._batches}"
            with self._tracing.batch([entry.traceparent for entry in entries], batch=batch, release=release.name):
                done, changed = self._answer(release, entries, batch)
            trim_memory()
            users = {entry.event.user_id for entry in entries}
            self._count(release, done, len(users))
            self._control = done[-1].event.user_id if done else self._control
            log.info("batch", batch=batch, events=len(done), users=len(users), release=release.name)
            entries = self._stream.still_there(changed) if changed else []

    def _answer(self, release: ServingRelease, entries: list[Entry], batch: str) -> tuple[list[Entry], list[Entry]]:
        """Make and commit the results of a batch.

        Returns:
            Its entries that are finished, and those of users of whom something changed meanwhile.
        """
        groups = {group[0].event.user_id: group for group in _by_user(entries)}
        with self._timed("history"):
            known = release.read_histories(list(groups))
            recent, joined = self._join(groups)
        with self._timed("inference"):
            tokens_before = release.num_tokens
            results = answer_users(release, known, recent, self._config.k)
            self.metrics.tokens.inc(release.num_tokens - tokens_before)
        commits = [Commit(group, recent[user], results[user]) for user, group in groups.items()]
        with self._timed("store"):
            answers = self._store.commit(commits, release=release.name, order=release.order, batch=batch)
        done: list[Entry] = []
        changed: list[Entry] = []
        for (user, group), commit, stored in zip(groups.items(), commits, answers, strict=True):
            if stored is None:
                changed += group
                continue
            done += group
            self.metrics.results.labels(outcome="stored").inc(stored)
            self.metrics.results.labels(outcome="older").inc(len(commit.results) - stored)
            for how in joined[user]:
                self.metrics.joined.labels(how=how).inc()
            as_of_us = known.get(user, KnownHistory()).as_of_us
            self.metrics.late_events.inc(sum(entry.event.ts_us < as_of_us for entry in group))
        return done, changed

    def _join(self, groups: dict[str, list[Entry]]) -> tuple[dict[str, RecentEvents], dict[str, list[Joined]]]:
        """By user, the recent history with the new events, and how they join it."""
        stored, limit = self._store.recent(list(groups)), self._config.history_events
        pairs = {user: stored[user].join([one.event for one in group], limit) for user, group in groups.items()}
        return {user: recent for user, (recent, _) in pairs.items()}, {user: how for user, (_, how) in pairs.items()}

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
        if self._control:
            self._store.note_control(self._control)
            self._control = ""  # said once: a user who is erased afterwards must not come back
        entries, pending, dead = self._stream.counts()
        memory: Any = self._client.info("memory")
        if not self._checked:  # at the start Redis may have been away
            require_no_eviction(memory)
            self._checked = True
        persistence: Any = self._client.info("persistence")
        self.metrics.stream_entries.set(entries)
        self.metrics.lag_entries.set(max(0, entries - pending))
        self.metrics.oldest_entry_age.set(self._stream.oldest_age_seconds())
        self.metrics.pending_entries.set(pending)
        self.metrics.dead_letters.set(dead)
        self.metrics.note_redis(memory, persistence)

    def _leave_queue(self) -> None:
        self._stream.leave()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        with self._tracing.part(part), self.metrics.stage_seconds.labels(part=part).time():
            yield


def _by_user(entries: list[Entry]) -> list[list[Entry]]:
    """The entries of each user."""
    by_user: dict[str, list[Entry]] = {}
    for entry in entries:
        by_user.setdefault(entry.event.user_id, []).append(entry)
    return list(by_user.values())


def _halve(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Two halves, by users if there are several, else by time."""
    groups = _by_user(entries)
    if len(groups) == 1:
        groups = [[entry] for entry in sorted(entries, key=lambda entry: entry.event.ts)]
    half = len(groups) // 2
    return list(chain.from_iterable(groups[:half])), list(chain.from_iterable(groups[half:]))
