"""Which release is wanted and which one serves, as the publisher and the workers agree on it in Redis.

urm:release:order           number of the last publication
urm:release:wanted          the release that workers should serve
urm:release:serving         the release that a worker flipped to last; the API reads its titles and fallback
urm:release:answers:<order> hash: worker → what it did with that publication
urm:workers                 sorted set: workers by the instant from which they count as gone
urm:worker:<name>           the release that a worker serves; expires at that instant

Instants are Redis' own, and the number of a publication is that of its milliseconds: it grows also when Redis has
forgotten the ones before, while workers still serve them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis
import structlog

from components.exceptions import ReleaseError, UnavailableError
from components.release.publication import (
    _ORDER,
    SERVING,
    WANTED,
    Answer,
    Publication,
    _value,
    live_workers,
    publish,
    read_publication,
)

log = structlog.get_logger()

_POLL_SECONDS = 0.1
_RESTORE_SECONDS = 5.0  # for a Redis that is away just then; who is told to end has little more


def roll_out(client: redis.Redis, release: str, bundle: str, timeout_seconds: float) -> Publication:
    """Publish a release and wait until every live worker serves it; else bring the wanted release back.

    That is so however the wait ends, also by SIGTERM: nobody knows then whether the release can be served.

    Raises:
        UnavailableError: No worker is alive.
        ReleaseError: A worker rejected the release, or did not answer in time.
        redis.RedisError: Redis does not answer.
    """
    require_worker(client)
    before = read_publication(client, WANTED) or read_publication(client, SERVING)
    publication = publish(client, release, bundle)
    try:
        _wait(client, publication, timeout_seconds)
    except BaseException:
        _restore(client, before, publication)
        raise
    return publication


def require_worker(client: redis.Redis) -> None:
    """Make sure that a worker is there to answer.

    Raises:
        UnavailableError: None is.
    """
    if not live_workers(client):
        raise UnavailableError(
            "recall workers",
            expected="at least one alive",
            got="no heartbeat in Redis",
            remedy="start one with `urm up` or `urm recall worker`",
        )


def _wait(client: redis.Redis, publication: Publication, timeout_seconds: float) -> None:
    """Return when all live workers serve the publication; Redis and the live workers may come and go meanwhile."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        late = time.monotonic() > deadline
        try:
            silent = _find_silent(client, publication)
        except (redis.ConnectionError, redis.TimeoutError):
            if late:
                raise
        else:
            if not silent:
                return
            if late:
                raise _failed(publication, f"no answer from {silent} within {timeout_seconds:g} s", "look at its log; ")
        time.sleep(_POLL_SECONDS)


def _find_silent(client: redis.Redis, publication: Publication) -> str:
    """Who has not answered yet; empty when all live workers serve the publication."""
    rows = _value(client.hgetall(f"urm:release:answers:{publication.order}"))
    answers = {worker: Answer.model_validate_json(text) for worker, text in rows.items()}
    for worker, given in answers.items():
        if given.outcome == "rejected":
            raise _failed(publication, f"a rejection by {worker}: {given.reason}", "mend the release; ")
    silent = live_workers(client) - answers.keys()
    return ", ".join(sorted(silent)) or ("" if answers else "every worker, all gone")


def _restore(client: redis.Redis, before: Publication | None, failed: Publication) -> None:
    """Undo a publication, unless someone else has published since; a Redis that is away is tried for some seconds."""

    def undo(pipe: Any) -> None:
        current = pipe.get(WANTED)
        pipe.multi()
        if current is None or Publication.model_validate_json(current).order != failed.order:
            return
        if before is None:
            pipe.delete(WANTED)
        else:
            # A new order, because some worker may have flipped and written results under the failed one.
            pipe.set(WANTED, before.model_copy(update={"order": failed.order + 1}).model_dump_json())
            pipe.set(_ORDER, failed.order + 1)

    transaction: Callable[..., Any] = client.transaction
    deadline = time.monotonic() + _RESTORE_SECONDS
    while True:
        try:
            transaction(undo, WANTED, _ORDER)
            return
        except redis.RedisError as error:
            if time.monotonic() > deadline:
                log.error("wanted release not brought back", still_wanted=failed.release, error=str(error))
                return
        time.sleep(_POLL_SECONDS)


def _failed(publication: Publication, got: str, remedy: str) -> ReleaseError:
    return ReleaseError(
        f"release {publication.release}",
        expected="every worker to serve it",
        got=got.rstrip("."),
        remedy=remedy + "the release wanted before is wanted again",
    )
