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
from typing import Any, Literal

import redis
import structlog
from pydantic import BaseModel, ConfigDict

from components.exceptions import ReleaseError, UnavailableError

log = structlog.get_logger()

WANTED = "urm:release:wanted"
SERVING = "urm:release:serving"
_ORDER = "urm:release:order"
WORKERS = "urm:workers"
WORKER_PREFIX = "urm:worker:"
ANSWER_TTL_SECONDS = 86_400
# A worker renews its heartbeat between batches; one that is silent for longer than this counts as gone.
HEARTBEAT_TTL_SECONDS = 30
_POLL_SECONDS = 0.1
_RESTORE_SECONDS = 5.0  # for a Redis that is away just then; who is told to end has little more

# Take the number of a publication. KEYS: order.
_TAKE_ORDER = """
local time = redis.call('TIME')
local order = math.max(time[1] * 1000 + math.floor(time[2] / 1000), (redis.call('GET', KEYS[1]) or 0) + 1)
redis.call('SET', KEYS[1], string.format('%.0f', order))
return order
"""

# Renew a worker's heartbeat, and forget the workers that are gone.
# KEYS: heartbeat, workers. ARGV: worker, its state, seconds until it counts as gone.
_BEAT = """
local now = redis.call('TIME')[1]
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
"""

# Make a publication the serving one, unless a later one serves: a worker may finish loading long after the others.
# The next publication will be later, also if Redis has forgotten this one and its clock is behind.
# KEYS: serving, order. ARGV: publication JSON, its order.
_SERVE = """
local serving = redis.call('GET', KEYS[1])
if serving and cjson.decode(serving).order > tonumber(ARGV[2]) then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
if tonumber(redis.call('GET', KEYS[2]) or 0) < tonumber(ARGV[2]) then redis.call('SET', KEYS[2], ARGV[2]) end
return 1
"""


class Publication(BaseModel):
    """One act of asking the workers for a release.

    Attributes:
        release: Name of the release.
        bundle: URI of its bundle.
        order: Number of the publication; later ones are greater, also when they bring back an older release.
    """

    model_config = ConfigDict(frozen=True)

    release: str
    bundle: str
    order: int


class Answer(BaseModel):
    """What one worker did with a publication."""

    model_config = ConfigDict(frozen=True)

    outcome: Literal["serving", "rejected"]
    reason: str = ""
    seconds: float


def publish(client: redis.Redis, release: str, bundle: str) -> Publication:
    """Make a release the wanted one."""
    order = int(_value(client.eval(_TAKE_ORDER, 1, _ORDER)))
    publication = Publication(release=release, bundle=bundle, order=order)
    client.set(WANTED, publication.model_dump_json())
    return publication


def read_publication(client: redis.Redis, key: str) -> Publication | None:
    """The publication under WANTED or SERVING, or None before the first."""
    text = _value(client.get(key))
    return None if text is None else Publication.model_validate_json(text)


def answer(client: redis.Redis, publication: Publication, worker: str, answered: Answer) -> None:
    """Say what this worker did; one that serves the release makes it the serving one, unless a later one is."""
    key = f"urm:release:answers:{publication.order}"
    with client.pipeline(transaction=True) as pipe:
        pipe.hset(key, worker, answered.model_dump_json())
        pipe.expire(key, ANSWER_TTL_SECONDS)
        if answered.outcome == "serving":
            serve(pipe, publication)
        pipe.execute()


def serve(client: redis.Redis, publication: Publication) -> None:
    """Make a publication the serving one, unless a later one is."""
    client.eval(_SERVE, 2, SERVING, _ORDER, publication.model_dump_json(), str(publication.order))


def beat(client: redis.Redis, worker: str, state: str) -> None:
    """Renew a worker's heartbeat; `state` is the release that it serves, or empty."""
    client.eval(_BEAT, 2, WORKER_PREFIX + worker, WORKERS, worker, state, str(HEARTBEAT_TTL_SECONDS))


def sign_off(client: redis.Redis, worker: str) -> None:
    """Remove a worker's heartbeat, so that nobody waits for it."""
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(WORKER_PREFIX + worker)
        pipe.zrem(WORKERS, worker)
        pipe.execute()


def live_workers(client: redis.Redis) -> set[str]:
    """Names of the workers that beat lately."""
    seconds, _ = _value(client.time())
    return set(_value(client.zrangebyscore(WORKERS, f"({seconds}", "+inf")))


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


def _value(response: Any) -> Any:
    """The answer of a synchronous call; redis-py types it as if it could be awaited."""
    return response
