"""Dead letters: list them, replay them once the cause is fixed, or drop them; always a page at a time."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import Any

import redis

from components.config import RecallConfig
from components.exceptions import DataError, UnavailableError
from components.recall.state.events import decode_event
from components.recall.state.scripts import DEAD_STREAM, MARK_TTL_SECONDS, REPLAY, STREAM, accepted_key, waiting_key

_PAGE = 500


@dataclass(frozen=True)
class DeadLetter:
    """One event given up.

    Attributes:
        letter_id: Id in the dead-letter stream.
        event: The entry's text, as it was.
        reason: Why it was given up.
        deliveries: How often it was tried.
        at: When it was given up.
        version: Of the event's form.
    """

    letter_id: str
    event: str
    reason: str
    deliveries: int
    at: datetime
    version: str


def list_letters(client: redis.Redis, limit: int = 100) -> list[DeadLetter]:
    """Dead letters, oldest first."""
    rows: Any = client.xrange(DEAD_STREAM, count=limit)
    return [_parse(*row) for row in rows]


def count_letters(client: redis.Redis) -> int:
    """How many there are."""
    count: Any = client.xlen(DEAD_STREAM)
    return int(count)


def read_pages(
    client: redis.Redis, stream: str, end: str = "+", *, newest_first: bool = False
) -> Iterator[list[tuple[str, dict[str, str]]]]:
    """Entries of a stream up to that of an id, a page at a time, oldest first unless it is asked otherwise."""
    start = "-"
    while True:
        page: Any = (
            client.xrevrange(stream, end, start, _PAGE) if newest_first else client.xrange(stream, start, end, _PAGE)
        )
        if not page:
            return
        yield page
        start, end = (start, f"({page[-1][0]}") if newest_first else (f"({page[-1][0]}", end)


def replay(client: redis.Redis, letter_ids: list[str], config: RecallConfig) -> int:
    """Put letters back into the event stream and take them out of the dead letters, each at once.

    Returns:
        Number replayed; all letters if none is named.

    Raises:
        DataError: There is no such letter.
        UnavailableError: The stream is full.
    """
    script = client.register_script(REPLAY)
    replayed = 0
    for letter in chain.from_iterable(_select(client, letter_ids)):
        event_id, user_id = _ids(letter)
        instant, length = f"{time.time():.6f}", config.max_stream_length
        answer: Any = script(
            keys=[STREAM, DEAD_STREAM, accepted_key(user_id, event_id), waiting_key(user_id)],
            args=[letter.letter_id, letter.event, instant, MARK_TTL_SECONDS, length, letter.version, user_id],
        )
        if answer == -1:
            raise UnavailableError(
                "event stream",
                expected=f"room below {length} entries",
                got=f"a full stream, after {replayed} letters were replayed",
                remedy="wait for the workers and replay the rest",
            )
        replayed += int(answer)
    return replayed


def find_letter(client: redis.Redis, user_id: str, event_id: str) -> DeadLetter | None:
    """The newest dead letter of a user's event, or None."""
    for row in chain.from_iterable(read_pages(client, DEAD_STREAM, newest_first=True)):
        letter = _parse(*row)
        if _ids(letter) == (event_id, user_id):
            return letter
    return None


def drop(client: redis.Redis, letter_ids: list[str]) -> int:
    """Delete letters for good.

    Returns:
        Number dropped; all letters if none is named.

    Raises:
        DataError: There is no such letter.
    """
    dropped = 0
    for page in _select(client, letter_ids):
        deleted: Any = client.xdel(DEAD_STREAM, *(letter.letter_id for letter in page))
        dropped += int(deleted)
    return dropped


def _ids(letter: DeadLetter) -> tuple[str, str]:
    """Ids of the event and of its user; empty if the letter is no event."""
    try:
        event = decode_event(letter.event)
    except DataError:
        return "", ""
    return event.event_id, event.user_id


def _select(client: redis.Redis, letter_ids: list[str]) -> Iterator[list[DeadLetter]]:
    """Pages of the letters of these ids, or of all that are there now."""
    if letter_ids:
        yield [_find(client, letter_id) for letter_id in letter_ids]
        return
    newest: Any = client.xrevrange(DEAD_STREAM, count=1)
    for page in read_pages(client, DEAD_STREAM, newest[0][0]) if newest else ():
        yield [_parse(*row) for row in page]


def _find(client: redis.Redis, letter_id: str) -> DeadLetter:
    found: Any = []
    with suppress(redis.ResponseError):  # of what is no id
        found = client.xrange(DEAD_STREAM, letter_id, letter_id)
    if not found:
        raise DataError(
            f"dead letter {letter_id!r}",
            expected="the id of a dead letter",
            got="no such letter",
            remedy="see `urm recall dead-letters list`",
        )
    return _parse(*found[0])


def _parse(letter_id: str, fields: dict[str, str]) -> DeadLetter:
    return DeadLetter(
        letter_id=letter_id,
        event=fields["event"],
        reason=fields["reason"],
        deliveries=int(fields["deliveries"]),
        at=datetime.fromtimestamp(float(fields["at"]), UTC),
        version=fields.get("version", "1"),
    )
