"""Which release is wanted and which one serves, as promotions and workers agree on it in Redis; heartbeats of workers.

urm:release:order           number of the last publication
urm:release:wanted          the release that workers should serve
urm:release:serving         the release that a worker flipped to last; the API reads its titles and fallback
urm:release:answers:<order> hash: worker → what it did with that publication
urm:workers                 sorted set: workers by the instant from which they count as gone
urm:worker:<name>           the release that a worker serves; expires at that instant

Instants are those of Redis, and the number of a publication is that of its milliseconds: it grows also when Redis has
forgotten earlier ones while workers still serve them.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, Literal

import redis
from pydantic import BaseModel, ConfigDict

ORDER = "urm:release:order"
WANTED = "urm:release:wanted"
SERVING = "urm:release:serving"
WORKERS = "urm:workers"
WORKER_PREFIX = "urm:worker:"
ANSWER_TTL_SECONDS = 86_400
# A worker renews its heartbeat between batches; one that is silent for longer than this counts as gone.
HEARTBEAT_TTL_SECONDS = 30

# Take the number of a publication. KEYS: order.
_TAKE_ORDER = """
local time = redis.call('TIME')
local order = math.max(time[1] * 1000 + math.floor(time[2] / 1000), (redis.call('GET', KEYS[1]) or 0) + 1)
redis.call('SET', KEYS[1], string.format('%.0f', order))
return order
"""

# Renew a worker's heartbeat, and forget the workers that are gone.
# KEYS: heartbeat, workers. ARGV: worker, its state, seconds until it counts as gone.
_HEARTBEAT = """
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
    order = int(_value(client.eval(_TAKE_ORDER, 1, ORDER)))
    publication = Publication(release=release, bundle=bundle, order=order)
    client.set(WANTED, publication.model_dump_json())
    return publication


def read_publication(client: redis.Redis, key: str) -> Publication | None:
    """The publication under WANTED or SERVING, or None before the first."""
    text = _value(client.get(key))
    return None if text is None else Publication.model_validate_json(text)


def answer(client: redis.Redis, publication: Publication, worker: str, answered: Answer) -> None:
    """Record what this worker did; one that serves the release makes it the serving one, unless a later one is."""
    key = _answers_key(publication)
    with client.pipeline(transaction=True) as pipe:
        pipe.hset(key, worker, answered.model_dump_json())
        pipe.expire(key, ANSWER_TTL_SECONDS)
        if answered.outcome == "serving":
            serve(pipe, publication)
        pipe.execute()


def read_answers(client: redis.Redis, publication: Publication) -> dict[str, Answer]:
    """What each worker did with a publication, by its name."""
    rows = _value(client.hgetall(_answers_key(publication)))
    return {worker: Answer.model_validate_json(text) for worker, text in rows.items()}


def serve(client: redis.Redis, publication: Publication) -> None:
    """Make a publication the serving one, unless a later one is."""
    client.eval(_SERVE, 2, SERVING, ORDER, publication.model_dump_json(), str(publication.order))


def name_worker(pid: int | None = None) -> str:
    """Name of the worker in a process, by default this one; no other process has ever had it.

    The start time tells a restarted container's process 1 from the one before it, whose answers are still there.
    """
    pid = pid or os.getpid()
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:  # it has ended already
        fields = []
    return "-".join([socket.gethostname(), str(pid), *fields[19:20]])  # in ticks since the machine's boot


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
