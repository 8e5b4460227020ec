"""What a back-fill leaves in Redis beside the results: how far each shard is, and whom it must leave out."""

import hashlib
import time
from typing import Any

import redis
from pydantic import BaseModel

from components.recall.state.scripts import FORGOTTEN, backfill_key


class ShardProgress(BaseModel):
    """How far one shard of a back-fill is.

    Attributes:
        release: Release that computes.
        choice: Names the `k` and `filters` by which it does.
        shard: Its number, from 0.
        shards: How many there are.
        total: Users of the shard.
        done: Those finished, in the order of the list, whatever came of them.
        stored: Users whose results were computed and stored.
        current: Users who had a result of this publication, or got a newer one meanwhile.
        forgotten: Users who were erased and have not come back.
        failed: Users with whom the model failed, or whose keys in Redis are broken.
        users_per_second: Of late.
        waiting: Whether live events come first just then.
        finished: Whether no user is left.
        started_at: When it began, seconds since 1970.
        at: When this was written, seconds since 1970.
    """

    release: str
    choice: str = ""
    shard: int = 0
    shards: int = 1
    total: int = 0
    done: int = 0
    stored: int = 0
    current: int = 0
    forgotten: int = 0
    failed: int = 0
    users_per_second: float = 0.0
    waiting: bool = False
    finished: bool = False
    started_at: float = 0.0
    at: float = 0.0

    @property
    def eta_seconds(self) -> float | None:
        """How long the rest takes at this rate; None if that is not known."""
        return (self.total - self.done) / self.users_per_second if self.users_per_second else None


def read_progress(client: redis.Redis, order: int) -> list[ShardProgress]:
    """Every shard that has begun to fill a publication, by the number of shards and its own."""
    found: Any = client.hgetall(backfill_key(order))
    shards = [ShardProgress.model_validate_json(text) for text in found.values()]
    return sorted(shards, key=lambda one: (one.shards, one.shard))


def read_shard(client: redis.Redis, order: int, shard: int, shards: int) -> ShardProgress | None:
    """One shard's progress; None if it has not begun."""
    text: Any = client.hget(backfill_key(order), _field(shard, shards))
    return None if text is None else ShardProgress.model_validate_json(text)


def save_progress(client: redis.Redis, order: int, progress: ShardProgress, ttl_seconds: int) -> None:
    """Note how far a shard is; kept as long as the results that it stored."""
    with client.pipeline(transaction=True) as pipe:
        pipe.hset(backfill_key(order), _field(progress.shard, progress.shards), progress.model_dump_json())
        pipe.expire(backfill_key(order), ttl_seconds)
        pipe.execute()


def digest_user(user_id: str) -> str:
    """Stands for a user who was erased, whose id must not be kept."""
    return hashlib.sha256(user_id.encode(errors="surrogateescape")).hexdigest()[:32]


def note_erasure(client: redis.Redis, user_id: str) -> None:
    """Let no back-fill bring a user back before their next event."""
    client.zadd(FORGOTTEN, {digest_user(user_id): round(time.time())})


def _field(shard: int, shards: int) -> str:
    return f"{shard}/{shards}"
