"""Roll-out to the workers of one machine: they load the wanted release beside the serving one, and flip through Redis.

The keys are listed in `components/release/publication.py`.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import redis
import structlog
from redis.lock import Lock

from components.exceptions import ReleaseError, UnavailableError
from components.release.publication import (
    SERVING,
    WANTED,
    Publication,
    hold_promotion_lock,
    live_workers,
    publish,
    read_answers,
    read_publication,
    undo_publication,
)

log = structlog.get_logger()

_POLL_SECONDS = 0.1
_UNDO_SECONDS = 5.0  # for a Redis that is away just then; a process that got SIGTERM has little more


class WorkerFlip:
    """A `target.Target`: all live workers, each of which answers for itself."""

    def __init__(self, client: redis.Redis, lock: Lock | None = None) -> None:
        """Take a client that returns str, and the lock of the promotion, if there is one."""
        self._client = client
        self._lock = lock
        self._before: Publication | None = None
        self._settled = False
        self.figures: Mapping[str, float] = {}

    @contextmanager
    def hold(self, timeout_seconds: float) -> Iterator[None]:
        """See Target; a lock in Redis."""
        with hold_promotion_lock(self._client, timeout_seconds) as self._lock:
            yield

    def require_lock(self) -> None:
        """See Target; a lost lock is a LockError of redis-py."""
        if self._lock is not None:
            self._lock.reacquire()

    def settle(self, champion: str, last_order: int, timeout_seconds: float) -> Publication | None:
        """See Target.

        What workers still reload after a failed promotion counts as serving, not what they are about to leave. What a
        worker rejected failed, too, and was killed before it could be undone: nothing to go by.
        """
        wanted, serving = read_publication(self._client, WANTED), read_publication(self._client, SERVING)
        if wanted is not None and wanted.undoes and (serving is None or serving.order < wanted.order):
            serving = wanted
        elif serving is not None and serving.release != champion:
            answers = read_answers(self._client, serving).values()
            serving = None if any(given.outcome == "rejected" for given in answers) else serving
        self._before, self._settled = serving, True
        return serving

    def publish(
        self, release: str, bundle: str, manifest: str = "", notes: Mapping[str, str] | None = None
    ) -> Publication:
        """See Target."""
        if not live_workers(self._client):
            raise UnavailableError(
                "recall workers",
                expected="at least one alive",
                got="no heartbeat in Redis",
                remedy="start one with `urm up` or `urm recall worker`",
            )
        if not self._settled:
            # What serves comes first: a promotion that was killed leaves wanted what nobody may be able to serve.
            self._before = read_publication(self._client, SERVING) or read_publication(self._client, WANTED)
        return publish(self._client, release, bundle, self._lock, manifest)

    def wait(self, publication: Publication, timeout_seconds: float) -> None:
        """See Target; Redis and the live workers may come and go meanwhile."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            late = time.monotonic() > deadline
            try:
                self.require_lock()
                silent = _find_silent(self._client, publication)
            except (redis.ConnectionError, redis.TimeoutError):
                if late:
                    raise
            else:
                if not silent:
                    return
                if late:
                    got = f"no answer from {silent} within {timeout_seconds:g} s"
                    raise _failed(publication, got, "look at its log; ")
            time.sleep(_POLL_SECONDS)

    def undo(self, publication: Publication) -> None:
        """See Target; an unavailable Redis is retried for some seconds."""
        deadline = time.monotonic() + _UNDO_SECONDS
        while True:
            try:
                undo_publication(self._client, publication, self._before)
                return
            except redis.RedisError as error:
                if time.monotonic() > deadline:
                    log.error("wanted release not restored", still_wanted=publication.release, error=str(error))
                    return
            time.sleep(_POLL_SECONDS)


def _find_silent(client: redis.Redis, publication: Publication) -> str:
    """Workers that have not answered yet; empty when all live workers serve the publication."""
    answers = read_answers(client, publication)
    for worker, given in answers.items():
        if given.outcome == "rejected":
            raise _failed(publication, f"a rejection by {worker}: {given.reason}", "fix the release; ")
    silent = live_workers(client) - answers.keys()
    return ", ".join(sorted(silent)) or ("" if answers else "every worker, all gone")


def _failed(publication: Publication, got: str, remedy: str) -> ReleaseError:
    return ReleaseError(
        f"release {publication.release}",
        expected="every worker to serve it",
        got=got.rstrip("."),
        remedy=remedy + "the release wanted before is wanted again",
    )
