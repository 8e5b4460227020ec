"""Which release is wanted and which one serves, as promotions and workers agree on it in Redis; heartbeats of workers.

urm:release:lock            the promotion in progress; publications of others are refused
urm:release:order           number of the last publication
urm:release:wanted          the release that workers should serve
urm:release:serving         the release that a worker flipped to last; the API reads its titles and fallback
urm:release:answers:<order> hash: worker → what it did with that publication
urm:workers                 sorted set: workers by the instant from which they count as gone
urm:worker:<name>           the release that a worker serves; expires at that instant

Instants are those of Redis, and the number of a publication is that of its milliseconds: it grows also when Redis has
forgotten earlier ones while workers still serve them.
"""

import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

import redis
from pydantic import BaseModel, ConfigDict
from redis.exceptions import LockError
from redis.lock import Lock

from components.exceptions import ConfigError, ReleaseError, UnavailableError
from components.process_start import ticks_at_start
from components.settings import Settings

LOCK = "urm:release:lock"
ORDER = "urm:release:order"
WANTED = "urm:release:wanted"
SERVING = "urm:release:serving"
WORKERS = "urm:workers"
WORKER_PREFIX = "urm:worker:"
ANSWER_TTL_SECONDS = 86_400
# A worker renews its heartbeat between batches; one that is silent for longer than this counts as gone.
HEARTBEAT_TTL_SECONDS = 30
LOCK_TTL_SECONDS = 60  # renewed while a promotion waits; the next one waits so long for one that was killed

# The number of a publication, as part of a script.
_NEXT_ORDER = """
local time = redis.call('TIME')
local order = math.max(time[1] * 1000 + math.floor(time[2] / 1000), (redis.call('GET', KEYS[1]) or 0) + 1)
redis.call('SET', KEYS[1], string.format('%.0f', order))
"""

# Make a release the wanted one, unless another promotion is in progress. Returns its number, or 0.
# KEYS: order, wanted, lock. ARGV: release, bundle, digest of its manifest, token of the caller's lock or ''.
_PUBLISH = (
    """
if (redis.call('GET', KEYS[3]) or '') ~= ARGV[4] then return 0 end
"""
    + _NEXT_ORDER
    + """
redis.call('SET', KEYS[2], cjson.encode({release = ARGV[1], bundle = ARGV[2], manifest = ARGV[3], order = order}))
return order
"""
)

# KEYS: order. Returns the number of a publication that stands elsewhere than in Redis.
_ALLOT = _NEXT_ORDER + "return string.format('%.0f', order)"

# KEYS: order. ARGV: the least that it must be.
_CONTINUE = """
if tonumber(redis.call('GET', KEYS[1]) or 0) < tonumber(ARGV[1]) then redis.call('SET', KEYS[1], ARGV[1]) end
"""

# Want again what was wanted before a publication, unless something else is wanted by now. It gets a number of its own,
# because some worker may have flipped and written results under the failed one.
# KEYS: order, wanted. ARGV: the failed number, release, bundle and digest from before; none if there was nothing.
_UNDO = (
    """
local wanted = redis.call('GET', KEYS[2])
if not wanted or cjson.decode(wanted).order ~= tonumber(ARGV[1]) then return 0 end
if not ARGV[2] then return redis.call('DEL', KEYS[2]) end
"""
    + _NEXT_ORDER
    + """
local again = {release = ARGV[2], bundle = ARGV[3], manifest = ARGV[4], order = order, undoes = tonumber(ARGV[1])}
redis.call('SET', KEYS[2], cjson.encode(again))
return 1
"""
)

# Renew a worker's heartbeat, and forget the workers that are gone.
# KEYS: heartbeat, workers. ARGV: worker, its state, seconds until it counts as gone.
_HEARTBEAT = """
local now = redis.call('TIME')[1]
redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[1])
"""

# Make a publication the serving one again, unless a later one serves: Redis has forgotten it. The next publication will
# be later, also if the clock of Redis is behind.
# KEYS: serving, order. ARGV: publication JSON, its order.
_SERVE = """
local serving = redis.call('GET', KEYS[1])
if serving and cjson.decode(serving).order > tonumber(ARGV[2]) then return end
redis.call('SET', KEYS[1], ARGV[1])
if tonumber(redis.call('GET', KEYS[2]) or 0) < tonumber(ARGV[2]) then redis.call('SET', KEYS[2], ARGV[2]) end
"""

# The same for a worker whose release never changes: a later publication keeps its place only as long as a live worker
# serves its release.
# KEYS: serving, order, workers. ARGV: publication JSON, its order, prefix of heartbeats.
_SERVE_UNLESS_SERVED = """
local own = tonumber(ARGV[2])
local serving = cjson.decode(redis.call('GET', KEYS[1]) or '{"order": 0}')
if serving.order == own then return end
if serving.order > own then
    for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '(' .. redis.call('TIME')[1], '+inf')) do
        if redis.call('GET', ARGV[3] .. worker) == serving.release then return end
    end
end
redis.call('SET', KEYS[1], ARGV[1])
if tonumber(redis.call('GET', KEYS[2]) or 0) < own then redis.call('SET', KEYS[2], ARGV[2]) end
"""

# Record what a worker did with a publication; if it can serve it, make that the serving one. Nothing happens if it may
# no longer serve it, because something else is wanted by now; what serves already may be served in any case. Returns 1
# or 0.
# KEYS: answers, serving, wanted. ARGV: worker, answer, its TTL, 1 to serve, publication JSON, its order.
_ANSWER = """
if ARGV[4] == '1' then
    local function holds(key)
        local current = redis.call('GET', key)
        return current and cjson.decode(current).order == tonumber(ARGV[6])
    end
    if not holds(KEYS[3]) and not holds(KEYS[2]) then return 0 end
    redis.call('SET', KEYS[2], ARGV[5])
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('EXPIRE', KEYS[1], ARGV[3])
return 1
"""


class Publication(BaseModel):
    """One act of asking the workers for a release.

    Attributes:
        release: Name of the release.
        bundle: URI of its bundle.
        manifest: SHA-256 of its manifest, which has that of every file; empty if it is not known.
        order: Number of the publication; later ones are greater, also when they bring back an older release.
        undoes: Number of the failed publication instead of which this one wants again what was there before; else 0.
    """

    model_config = ConfigDict(frozen=True)

    release: str
    bundle: str
    manifest: str = ""
    order: int
    undoes: int = 0


class Answer(BaseModel):
    """What one worker did with a publication."""

    model_config = ConfigDict(frozen=True)

    outcome: Literal["serving", "rejected"]
    reason: str = ""
    seconds: float


@contextmanager
def hold_promotion_lock(client: redis.Redis, timeout_seconds: float) -> Iterator[Lock]:
    """Let one promotion run at a time; its lock is to be renewed (`reacquire`) within `LOCK_TTL_SECONDS`.

    Raises:
        UnavailableError: Another promotion does not end in time.
    """
    lock = client.lock(LOCK, timeout=LOCK_TTL_SECONDS, blocking_timeout=timeout_seconds, thread_local=False)
    if not lock.acquire():
        raise UnavailableError(
            "promotion",
            expected=f"the one in progress to end within {timeout_seconds:g} s",
            got="one that goes on",
            remedy="wait for it and try again",
        )
    try:
        yield lock
    finally:
        with suppress(LockError, redis.RedisError):  # lost already, or it expires by itself
            lock.release()


def publish(
    client: redis.Redis, release: str, bundle: str, lock: Lock | None = None, manifest: str = ""
) -> Publication:
    """Make a release the wanted one.

    Raises:
        ReleaseError: Another promotion is in progress.
    """
    token = lock.local.token if lock is not None else ""
    order = int(_value(client.eval(_PUBLISH, 3, ORDER, WANTED, LOCK, release, bundle, manifest, token)))
    if not order:
        raise ReleaseError(
            f"release {release}", expected="the only promotion", got="another in progress", remedy="try again later"
        )
    return Publication(release=release, bundle=bundle, manifest=manifest, order=order)


def continue_orders(client: redis.Redis, last: int) -> None:
    """Let the next publication have a number above the last one, also if Redis has forgotten it."""
    client.eval(_CONTINUE, 1, ORDER, str(last))


def allot_order(client: redis.Redis) -> int:
    """The number of a publication that stands elsewhere than in Redis; greater than all before it."""
    return int(_value(client.eval(_ALLOT, 1, ORDER)))


def undo_publication(client: redis.Redis, failed: Publication, before: Publication | None) -> None:
    """Want again what was there before, under a new number, unless something else is wanted by now."""
    arguments = [str(failed.order), *([before.release, before.bundle, before.manifest] if before else [])]
    client.eval(_UNDO, 2, ORDER, WANTED, *arguments)


def read_publication(client: redis.Redis, key: str) -> Publication | None:
    """The publication under WANTED or SERVING, or None before the first."""
    text = _value(client.get(key))
    return None if text is None else Publication.model_validate_json(text)


def answer(client: redis.Redis, publication: Publication, worker: str, answered: Answer) -> bool:
    """Record what this worker did; if it can serve the release, make it the serving one.

    Returns:
        Whether that counts; not if the worker can serve what is no longer wanted.
    """
    serves = "1" if answered.outcome == "serving" else "0"
    arguments = [worker, answered.model_dump_json(), ANSWER_TTL_SECONDS, serves]
    published = [publication.model_dump_json(), publication.order]
    keys = [_answers_key(publication), SERVING, WANTED]
    return bool(client.eval(_ANSWER, 3, *keys, *map(str, arguments), *map(str, published)))


def read_answers(client: redis.Redis, publication: Publication) -> dict[str, Answer]:
    """What each worker did with a publication, by its name."""
    rows = _value(client.hgetall(_answers_key(publication)))
    return {worker: Answer.model_validate_json(text) for worker, text in rows.items()}


def serve(client: redis.Redis, publication: Publication) -> None:
    """Make a publication the serving one again where Redis has forgotten it, unless a later one is."""
    client.eval(_SERVE, 2, SERVING, ORDER, publication.model_dump_json(), str(publication.order))


def serve_unless_served(client: redis.Redis, publication: Publication) -> None:
    """Make a publication the serving one, unless a later one is whose release a live worker serves."""
    arguments = [publication.model_dump_json(), str(publication.order), WORKER_PREFIX]
    client.eval(_SERVE_UNLESS_SERVED, 3, SERVING, ORDER, WORKERS, *arguments)


def read_environment(settings: Settings) -> Publication | None:
    """The publication that a pod's template names; None before the first promotion.

    Raises:
        ConfigError: It is incomplete.
    """
    if not settings.release:
        return None
    for name, pattern, expected in (
        ("release_bundle", ".+", "the URI of its bundle"),
        ("release_manifest", "[0-9a-f]{64}", "the SHA-256 of its manifest"),
        ("release_order", "[1-9][0-9]*", "the number of its publication"),
    ):
        value = str(getattr(settings, name))
        if not re.fullmatch(pattern, value):
            raise ConfigError(
                f"release {settings.release}, URM_{name.upper()}",
                expected=expected,
                got=repr(value),
                remedy="promote it again: a promotion sets all annotations of the pod template",
            )
    return Publication(
        release=settings.release,
        bundle=settings.release_bundle,
        manifest=settings.release_manifest,
        order=int(settings.release_order),
    )


def name_worker(pid: int | None = None) -> str:
    """Name of the worker in a process, by default this one; no other process has ever had it.

    The start time tells a restarted container's process 1 from the one before it, whose answers are still there.
    """
    pid = pid or os.getpid()
    ticks = ticks_at_start(pid)
    return "-".join([socket.gethostname(), str(pid), *([] if ticks is None else [str(ticks)])])


def send_heartbeat(client: redis.Redis, worker: str, state: str) -> None:
    """Renew a worker's heartbeat; `state` is the release that it serves, or empty."""
    client.eval(_HEARTBEAT, 2, WORKER_PREFIX + worker, WORKERS, worker, state, str(HEARTBEAT_TTL_SECONDS))


def unregister(client: redis.Redis, worker: str) -> None:
    """Remove a worker's heartbeat, so that no promotion waits for it."""
    with client.pipeline(transaction=True) as pipe:
        pipe.delete(WORKER_PREFIX + worker)
        pipe.zrem(WORKERS, worker)
        pipe.execute()


def live_workers(client: redis.Redis) -> set[str]:
    """Names of the workers with a fresh heartbeat."""
    seconds, _ = _value(client.time())
    return set(_value(client.zrangebyscore(WORKERS, f"({seconds}", "+inf")))


def _answers_key(publication: Publication) -> str:
    return f"urm:release:answers:{publication.order}"


def _value(response: Any) -> Any:
    """The answer of a synchronous call; redis-py types it as if it could be awaited."""
    return response
