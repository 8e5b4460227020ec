"""Erasure: everything that Redis holds of a user.

What lies elsewhere is not touched: the source data, the feature store, and releases trained on them. A digest of the
user's id stays, so that no back-fill computes results from that feature store again before the user's next event.
"""

from collections import Counter
from itertools import islice

import redis

from components.exceptions import DataError
from components.recall.operate.deadletters import read_pages
from components.recall.state.backfill import note_erasure
from components.recall.state.events import decode_event
from components.recall.state.scripts import (
    CONTROL,
    DEAD_STREAM,
    GROUP,
    STREAM,
    accepted_key,
    history_keys,
    result_key,
    waiting_key,
)
from components.recall.state.stream import is_group_gone

_PAGE = 1000


def forget_user(client: redis.Redis, user_id: str) -> Counter[str]:
    """Delete what is kept of a user; a pass over all keys, a page at a time.

    Unfinished events go first: a worker that is at one stores nothing for it afterwards.

    Returns:
        What was deleted, by kind.
    """
    kinds = ("waiting events", "dead letters", "histories", "marks of events", "results")
    deleted = Counter(dict.fromkeys(kinds, 0))
    note_erasure(client, user_id)
    for stream, what in zip((STREAM, DEAD_STREAM), kinds, strict=False):
        for page in read_pages(client, stream):
            ids = [entry_id for entry_id, fields in page if _user(fields) == user_id]
            if ids:
                _acknowledge(client, stream, ids)
                deleted[what] += int(client.xdel(stream, *ids))
    client.delete(waiting_key(user_id))
    deleted["histories"] = -(-_unlink(client, list(history_keys(user_id))) // 2)
    if client.get(CONTROL) == user_id:  # without a history, no worker names the user there again
        client.delete(CONTROL)
    results, marks = result_key(user_id, ""), accepted_key(user_id, "")
    keys_left = client.scan_iter("urm:*", count=_PAGE)
    while keys := list(islice(keys_left, _PAGE)):
        deleted["marks of events"] += _unlink(client, [key for key in keys if key.startswith(marks)])
        # Of a user whose id goes on with a colon, the rest is no task: its name has none.
        mine = [key for key in keys if key.startswith(results) and ":" not in key.removeprefix(results)]
        deleted["results"] += _unlink(client, mine)
    return deleted


def _acknowledge(client: redis.Redis, stream: str, ids: list[str]) -> None:
    try:
        client.xack(stream, GROUP, *ids)
    except redis.ResponseError as error:
        if not is_group_gone(error):
            raise


def _unlink(client: redis.Redis, keys: list[str]) -> int:
    return int(client.unlink(*keys)) if keys else 0


def _user(fields: dict[str, str]) -> str | None:
    try:
        return decode_event(fields.get("event", "")).user_id
    except DataError:
        return None
