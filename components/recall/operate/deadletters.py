"""Dead letters: list them, replay them once the cause is fixed, or drop them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis

from components.exceptions import DataError
from components.recall.state.events import decode_event
from components.recall.state.scripts import DEAD_STREAM, MARK_TTL_SECONDS, REPLAY, STREAM, accepted_key


@dataclass(frozen=True)
class DeadLetter:
    """One event given up.

    Attributes:
        letter_id: Id in the dead-letter stream.
        event: The entry's text, as it was.
        reason: Why it was given up.
        deliveries: How often it was tried.
        at: When it was given up.
    """

    letter_id: str
    event: str
    reason: str
    deliveries: int
    at: datetime

    @property
    def printable(self) -> str:
        """The event's text with escapes for bytes that are no text."""
        return self.event.encode(errors="backslashreplace").decode()


def list_letters(client: redis.Redis, limit: int = 100) -> list[DeadLetter]:
    """Dead letters, oldest first."""
    return [_parse(letter_id, fields) for letter_id, fields in _range(client, "-", "+", limit)]


def replay(client: redis.Redis, letter_ids: list[str]) -> int:
    """Put letters back into the event stream and take them out of the dead letters, each at once.

    Returns:
        Number replayed; all letters if none is named.

    Raises:
        DataError: There is no such letter.
    """
    script = client.register_script(REPLAY)
    replayed = 0
    for letter in _select(client, letter_ids):
        event_id, user_id = _ids(letter)
        answer = script(
            keys=[STREAM, DEAD_STREAM, accepted_key(user_id, event_id)],
            args=[letter.letter_id, letter.event, f"{time.time():.6f}", MARK_TTL_SECONDS, user_id],
        )
        replayed += int(answer)
    return replayed


def find_letter(client: redis.Redis, user_id: str, event_id: str) -> DeadLetter | None:
    """The newest dead letter of a user's event, or None."""
    for letter in reversed(list_letters(client, limit=1_000_000)):
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
    letters = _select(client, letter_ids)
    if letters:
        client.xdel(DEAD_STREAM, *(letter.letter_id for letter in letters))
    return len(letters)


def _ids(letter: DeadLetter) -> tuple[str, str]:
    """Ids of the event and of its user; empty if the letter is no event."""
    try:
        event = decode_event(letter.event)
    except DataError:
        return "", ""
    return event.event_id, event.user_id


def _select(client: redis.Redis, letter_ids: list[str]) -> list[DeadLetter]:
    if not letter_ids:
        return list_letters(client, limit=1_000_000)
    letters = []
    for letter_id in letter_ids:
        try:
            found = _range(client, letter_id, letter_id, 1)
        except redis.ResponseError:
            found = []
        if not found:
            raise DataError(
                f"dead letter {letter_id!r}",
                expected="the id of a dead letter",
                got="no such letter",
                remedy="see `urm recall dead-letters list`",
            )
        letters.append(_parse(*found[0]))
    return letters


def _range(client: redis.Redis, start: str, end: str, limit: int) -> list[tuple[str, dict[str, str]]]:
    rows: Any = client.xrange(DEAD_STREAM, min=start, max=end, count=limit)
    return list(rows)


def _parse(letter_id: str, fields: dict[str, str]) -> DeadLetter:
    return DeadLetter(
        letter_id=letter_id,
        event=fields["event"],
        reason=fields["reason"],
        deliveries=int(fields["deliveries"]),
        at=datetime.fromtimestamp(float(fields["at"]), UTC),
    )
