"""Roll-out to the workers of one machine: they load the wanted release beside the serving one, and flip through Redis.

The keys are listed in `components/release/publication.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis
import structlog

from components.exceptions import ReleaseError, UnavailableError
from components.release.publication import (
    ORDER,
    SERVING,
    WANTED,
    Publication,
    live_workers,
    publish,
    read_answers,
    read_publication,
)

log = structlog.get_logger()

_POLL_SECONDS = 0.1
_UNDO_SECONDS = 5.0  # for a Redis that is away just then; a process that got SIGTERM has little more


class WorkerFlip:
    """A `target.Target`: all live workers, each of which answers for itself."""

    def __init__(self, client: redis.Redis) -> None:
        """Take a client that returns str."""
        self._client = client
        self._before: Publication | None = None

    def publish(self, release: str, bundle: str) -> Publication:
        """See Target."""
        if not live_workers(self._client):
            raise UnavailableError(
                "recall workers",
                expected="at least one alive",
                got="no heartbeat in Redis",
                remedy="start one with `urm up` or `urm recall worker`",
            )
        self._before = read_publication(self._client, WANTED) or read_publication(self._client, SERVING)
        return publish(self._client, release, bundle)

    def wait(self, publication: Publication, timeout_seconds: float) -> None:
        """See Target; Redis and the live workers may come and go meanwhile."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            late = time.monotonic() > deadline
            try:
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

        def restore(pipe: Any) -> None:
            current = pipe.get(WANTED)
            pipe.multi()
            if current is None or Publication.model_validate_json(current).order != publication.order:
                return
            if self._before is None:
                pipe.delete(WANTED)
            else:
                # A new order, because some worker may have flipped and written results under the failed one.
                again = self._before.model_copy(update={"order": publication.order + 1})
                pipe.set(WANTED, again.model_dump_json())
                pipe.set(ORDER, again.order)

        transaction: Callable[..., Any] = self._client.transaction
        deadline = time.monotonic() + _UNDO_SECONDS
        while True:
            try:
                transaction(restore, WANTED, ORDER)
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
