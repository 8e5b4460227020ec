"""The back-fill: results of all users that the serving release knows from training, before an event asks for them.

A promotion refreshes nobody, and without an event a user gets the fallback. The back-fill goes through the users of the
release's feature store and computes as the worker of the stream does, one shard of the users per process:

- Live events come first. It waits while one has been unfinished for `recall.backfill_pause_seconds`, keeps to a rate,
  and runs at the lowest priority. What an event has brought is never replaced (`FILL` in `state/scripts.py`).
- A shard can be killed and started again: progress is noted after each batch, and whoever has a result of the release,
  by these `k` and `filters`, is left as he is. Once finished, it starts over, which renews results that would expire;
  so does one that began so long ago that the results of its first users may.
- If another release serves meanwhile, it goes on with that one, once every worker serves it. So a back-fill that ends
  has filled the release that served then.
- Erased users (`urm recall forget`) are not brought back before their next event.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import redis
import structlog

from components.config import RecallConfig
from components.exceptions import ReleaseError
from components.memory import trim_memory
from components.recall.serving.answers import answer_users
from components.recall.serving.engine import ServingRelease
from components.recall.state.backfill import ShardProgress, read_shard, save_progress
from components.recall.state.store import UserStore
from components.recall.state.stream import EventStream
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.metrics import BackfillMetrics
from components.recall.worker.loop import PatientLoop, require_health
from components.recall.worker.source import Load
from components.redis_client import is_unavailable
from components.release.publication import SERVING, WORKER_PREFIX, Publication, live_workers, read_publication

log = structlog.get_logger()

REPORT_SECONDS = 10.0  # between two lines of progress
_WAIT_SECONDS = 0.5  # between two looks at what has to be waited for


class Backfill(PatientLoop):
    """One shard of the back-fill; `run` returns when it is finished, or after `stop`.

    Attributes:
        metrics: What it counts.
        finished: Whether every user of the shard has been looked at.
    """

    def __init__(
        self,
        client: redis.Redis,
        config: RecallConfig,
        load: Load,
        list_users: Callable[[Publication], Iterator[str]],
        shard: int = 0,
        shards: int = 1,
        users_per_second: float = 0.0,
    ) -> None:
        """Take what to work with.

        Args:
            client: Returns str.
            config: Sizes and limits.
            load: Loads and checks a release.
            list_users: Users whom the features of a release know, in an order that stays.
            shard: Which users, from 0 to `shards` - 1.
            shards: Of how many.
            users_per_second: Most users to compute; 0: no limit.
        """
        super().__init__(client)
        self.metrics = BackfillMetrics()
        self.finished = False
        self._config, self._load, self._list_users = config, load, list_users
        self._shard, self._shards, self._rate = shard, shards, users_per_second
        # No batch lasts much longer than a second because of the rate.
        self._batch_size = min(config.batch_size, max(1, round(users_per_second or config.batch_size)))
        self._store = UserStore(client, config)
        self._stream = EventStream(client, "", config)  # only looks
        self._release: ServingRelease | None = None
        self._progress = ShardProgress(release="")
        self._users: Iterator[str] = iter(())
        self._batch: list[str] = []  # in hand, until it is finished and noted
        self._next_batch_at = self._next_report_at = 0.0
        self._since = (0.0, 0)  # of the rate: when, and how many were done then

    def run(self) -> None:
        """Fill until finished or stopped; wait while Redis is unavailable.

        Raises:
            ReleaseError: No release serves, or it cannot be loaded.
            SickWorkerError: Whatever user it computes fails.
        """
        try:
            self._repeat()
        finally:
            self._client.close()
        if self._release is not None and not self.finished:
            log.info("back-fill stopped", **self._figures())

    def step(self) -> None:
        """One batch of users."""
        release = self._follow_release()
        if release is None or self._must_wait(release):
            self._sleep(_WAIT_SECONDS)
            return
        self._sleep(self._next_batch_at - time.monotonic())
        if self._stopping:
            return
        self._batch = self._batch or list(islice(self._users, self._batch_size))
        if not self._batch:
            self._finish(release)
            return
        outcomes = self._fill(release, self._batch)
        if outcomes["withdrawn"]:
            return  # the next step begins with what serves
        self._count(outcomes, len(self._batch))
        self._batch = []  # before saving, which may fail: a batch that is counted is not done again
        self._save(release)
        trim_memory()

    def _follow_release(self) -> ServingRelease | None:
        """What serves, loaded; None while workers are on their way to it."""
        publication = read_publication(self._client, SERVING)
        if publication is None:
            raise ReleaseError("back-fill", expected="a serving release", got="none", remedy="promote one first")
        if self._release is not None and self._release.publication == publication:
            return self._release
        others = self._serve_another(publication)
        if others:
            self._report("back-fill waits for a promotion to end", release=publication.release, workers=others)
            return None
        if self._release is not None and self._release.same_bundle(publication):
            self._release = self._release.republished(publication)
        else:
            self._release = None  # one at a time in memory
            self._release = self._load(publication)
        self._begin(self._release)
        return None  # what serves may have changed while it was loaded

    def _serve_another(self, publication: Publication) -> int:
        """Workers that serve another release than this."""
        names = [WORKER_PREFIX + worker for worker in live_workers(self._client)]
        states: Any = self._client.mget(names) if names else []
        return sum(state not in (None, "", publication.release) for state in states)

    def _begin(self, release: ServingRelease) -> None:
        """Start the shard, or go on where a process before this one was."""
        total = sum(1 for _ in self._read_shard(release))
        before = read_shard(self._client, release.order, self._shard, self._shards)
        oldest = time.time() - self._config.result_ttl_seconds / 2
        if before is None or before.finished or before.started_at < oldest or before.choice != self._store.choice:
            before = ShardProgress(
                release=release.name,
                choice=self._store.choice,
                shard=self._shard,
                shards=self._shards,
                started_at=time.time(),
                total=total,
            )
        self._progress, self._batch = before, []
        self._users = islice(self._read_shard(release), before.done, None)
        self._since = time.monotonic(), before.done
        self._next_report_at = time.monotonic() + REPORT_SECONDS
        self._save(release)
        log.info("back-fill goes on" if before.done else "back-fill begins", **self._figures())

    def _read_shard(self, release: ServingRelease) -> Iterator[str]:
        users = self._list_users(release.publication)
        return (user_id for user_id in users if choose_shard(user_id, self._shards) == self._shard)

    def _must_wait(self, release: ServingRelease) -> bool:
        """Whether live events come first."""
        age = self._stream.oldest_age_seconds()
        waiting = age > self._config.backfill_pause_seconds
        if waiting != self._progress.waiting:
            self._progress.waiting = waiting
            self._save(release)
        if waiting:
            self._report("back-fill waits for live events", oldest_event_seconds=round(age, 1))
        return waiting

    def _fill(self, release: ServingRelease, users: list[str]) -> Counter[str]:
        """Give results to those of the users who have none of this release; number of users by outcome."""
        tasks = [task.name for task in release.tasks if not task.needs_query]
        asked = [task.name for task in release.tasks if task.needs_query]
        has_results = self._store.renew(users, tasks, release.order, asked)
        missing = [user_id for user_id, has in zip(users, has_results, strict=True) if not has]
        outcomes = Counter({"current": len(users) - len(missing)})
        if self._rate:
            self._next_batch_at = time.monotonic() + len(missing) / self._rate
        while missing:
            filled = self._compute(release, missing)
            outcomes.update(outcome for outcome in filled.values() if outcome != "changed")
            missing = [user_id for user_id, outcome in filled.items() if outcome == "changed"]
        return outcomes

    def _compute(self, release: ServingRelease, users: list[str]) -> dict[str, str]:
        """Compute and store results; if that fails, of each half, down to the user at fault.

        Returns:
            By user, what the store says, or `failed`.

        Raises:
            SickWorkerError: The fault is this process's.
        """
        try:
            recent = self._store.recent(users)
            results = answer_users(release, release.read_histories(users), recent, self._config.k)
            return dict(self._store.fill(results, recent, release.order))
        except Exception as error:  # whatever a user's data or a broken process makes the libraries raise
            if is_unavailable(error):
                raise
            if len(users) > 1:
                half = len(users) // 2
                return self._compute(release, users[:half]) | self._compute(release, users[half:])
            require_health(release, {}, error)
            log.error("a user is left out", error=name_error(error))
            return {users[0]: "failed"}

    def _count(self, outcomes: Counter[str], num_users: int) -> None:
        for outcome, number in outcomes.items():
            self.metrics.users.labels(outcome=outcome).inc(number)
            setattr(self._progress, outcome, getattr(self._progress, outcome) + number)
        self._progress.done += num_users

    def _save(self, release: ServingRelease) -> None:
        progress, (since, done) = self._progress, self._since
        seconds = time.monotonic() - since
        progress.users_per_second = (progress.done - done) / seconds if seconds else 0.0
        progress.at = time.time()
        save_progress(self._client, release.order, progress, self._config.result_ttl_seconds)
        self.metrics.shard_users.set(progress.total)
        self.metrics.shard_users_done.set(progress.done)
        self.metrics.waiting.set(progress.waiting)
        if not progress.finished:
            self._report("back-fill", **self._figures())

    def _finish(self, release: ServingRelease) -> None:
        self._progress.finished = True
        self._save(release)
        log.info("back-fill finished", **self._figures())
        self.finished = True
        self.stop()

    def _figures(self) -> dict[str, object]:
        progress = self._progress
        eta = progress.eta_seconds
        return {
            "release": progress.release,
            "shard": f"{progress.shard}/{progress.shards}",
            "done": progress.done,
            "total": progress.total,
            "stored": progress.stored,
            "current": progress.current,
            "failed": progress.failed,
            "users_per_second": round(progress.users_per_second, 1),
            "eta_seconds": None if eta is None else round(eta),
        }

    def _report(self, what: str, **figures: object) -> None:
        """A line of the log, not too often."""
        if time.monotonic() >= self._next_report_at:
            log.info(what, **figures)
            self._next_report_at = time.monotonic() + REPORT_SECONDS


def choose_shard(user_id: str, shards: int) -> int:
    """The shard of a user: the same on every machine, and for every release."""
    return int.from_bytes(hashlib.blake2b(user_id.encode(), digest_size=8).digest()) % shards
