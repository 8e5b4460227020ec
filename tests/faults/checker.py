"""The judge of a fault run: notes what was accepted and what was read, and says afterwards what was broken.

Four invariants:

1. Every accepted event is *visible* or a dead letter. It is visible if it lies in its user's live history and the
   stored result of every task that is always answered was computed from exactly this history. The latter is no guess: a
   history counts its events in a revision, and a result carries the revision that it was computed from.
2. No read gives a result older, by the order in which results replace one another (event time, revision, release),
   than one read before for the same user and task. Read are both the API's answer, which shows source and event time,
   and the hash in Redis, which shows all three.
3. The counts add up: accepted = visible + dead, no event has two dead letters, nothing is left in the stream or
   pending.
4. No dead letter's event is in its user's live history: it would break every later inference of the user.

An event whose sender never got an answer counts as unknown: it may have been accepted or not.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import redis

from components.recall.state.events import Event, decode_event
from components.recall.state.scripts import DEAD_STREAM, GROUP, STREAM, history_keys, result_key

ALWAYS_ANSWERED = ("next_purchase", "new_item")  # tasks of the tiny release that need no query
Order = tuple[int, int, int]
_NO_EVENT = datetime.min.replace(tzinfo=UTC)  # of a fallback


@dataclass
class Report:
    """What a run came to.

    Attributes:
        accepted: Events accepted, each id once.
        visible: Of them, those that the stored results know.
        dead: Of them, those that are dead letters.
        unknown: Events without a definite answer.
        reads: Answers of the API.
        violations: A sentence for each.
    """

    accepted: int = 0
    visible: int = 0
    dead: int = 0
    unknown: int = 0
    reads: int = 0
    violations: list[str] = field(default_factory=list)


class Checker:
    """Notes during a run; `check` judges at its end."""

    def __init__(self, client: redis.Redis) -> None:
        self._client: Any = client
        self._accepted: dict[str, Event] = {}
        self._unknown: set[str] = set()
        self._refused: set[str] = set()
        self._exact = True
        self._newest: dict[tuple[str, str], Order] = {}
        self._shown: dict[tuple[str, str], datetime] = {}  # the event time that the API showed last
        self._reads = 0
        self._violations: list[str] = []

    @property
    def users(self) -> set[str]:
        return {event.user_id for event in self._accepted.values()}

    @property
    def accepted(self) -> list[Event]:
        """In the order in which they were accepted."""
        return list(self._accepted.values())

    @property
    def accepted_ids(self) -> list[str]:
        """In the order in which they were accepted."""
        return list(self._accepted)

    @property
    def num_refused(self) -> int:
        return len(self._refused)

    def note_sent(self, events: Iterable[Event]) -> None:
        """They are under way."""
        self._unknown |= {event.event_id for event in events} - self._accepted.keys()

    def note_accepted(self, events: Iterable[Event]) -> None:
        """The API said 202, "accepted" or "duplicate": either way they are in."""
        for event in events:
            self._accepted.setdefault(event.event_id, event)
            self._unknown.discard(event.event_id)

    def note_refused(self, events: Iterable[Event]) -> None:
        """The API said 422; they must not turn up."""
        self._refused |= {event.event_id for event in events}
        self._unknown -= self._refused

    def note_amnesia(self) -> None:
        """Redis has lost its newest writes: reads may start again from older results.

        Revisions count on from an older number while a worker may still store a result under one that was lost, so
        they say nothing exact any more; a result must still be as new in time as its user's history.
        """
        self._newest.clear()
        self._shown.clear()
        self._exact = False

    def note_lost(self, event_ids: Iterable[str]) -> None:
        """Redis has lost these; they are owed no longer."""
        for event_id in event_ids:
            del self._accepted[event_id]

    def note_answer(self, answer: dict[str, Any]) -> None:
        """An answer of the API to a read; one of the model must not be older than one before, nor a fallback again."""
        self._reads += 1
        key = (answer["user_id"], answer["task"])
        now = datetime.fromisoformat(answer["event_ts"]) if answer["source"] == "model" else _NO_EVENT
        before = self._shown.get(key, now)
        if now < before:
            self._violations.append(f"read of {key}: an answer of {before}, then one of {now}")
        self._shown[key] = now

    def read_stored(self, user_id: str, task: str) -> None:
        """Read the numbers that order results from Redis."""
        row = self._client.hmget(result_key(user_id, task), "event_ts_us", "revision", "release_order")
        if row[0] is None:
            row = (0, 0, 0)
        key, now = (user_id, task), (int(row[0]), int(row[1]), int(row[2]))
        before = self._newest.get(key, now)
        if now < before:
            self._violations.append(f"result of {key}: {before} was read, then {now}")
        self._newest[key] = now

    def stored_numbers(self, user_id: str, task: str) -> Order:
        """The numbers read last."""
        return self._newest[(user_id, task)]

    def settled(self) -> bool:
        """Whether nothing waits and nothing is pending."""
        return self._client.xlen(STREAM) == 0 and self._client.xpending(STREAM, GROUP)["pending"] == 0

    def check(self) -> Report:
        """Judge a run that has settled."""
        report = Report(unknown=len(self._unknown), reads=self._reads, violations=list(self._violations))
        if not self.settled():
            report.violations.append("events are left in the stream or pending")
        dead = [decode_event(row["event"]) for _, row in self._client.xrange(DEAD_STREAM)]
        letters = Counter(event.event_id for event in dead)
        report.violations += [
            f"{event_id} has {count} dead letters" for event_id, count in letters.items() if count > 1
        ]
        report.violations += [
            f"{event.event_id} of {event.user_id} is dead and in the live history"
            for event in dead
            if f"e:{event.event_id}" in self._history(event.user_id)
        ]
        owed = [event for event in self._accepted.values() if event.event_id not in letters]
        histories = {user_id: self._history(user_id) for user_id in {event.user_id for event in owed}}
        stale = {user_id: self._stale(user_id, rows) for user_id, rows in histories.items()}
        for event_id in self._refused:
            if any(f"e:{event_id}" in rows for rows in histories.values()) or event_id in letters:
                report.violations.append(f"{event_id} was refused and processed all the same")
        for event in owed:
            if f"e:{event.event_id}" not in histories[event.user_id]:
                report.violations.append(f"{event.event_id} of {event.user_id} is neither in the history nor dead")
            elif stale[event.user_id]:
                report.violations.append(f"{event.event_id} of {event.user_id} is not visible: {stale[event.user_id]}")
            else:
                report.visible += 1
        report.accepted = len(self._accepted)
        report.dead = len(letters.keys() & self._accepted.keys())
        if report.accepted != report.visible + report.dead:
            report.violations.append(f"{report.accepted} accepted, but {report.visible} visible, {report.dead} dead")
        return report

    def _history(self, user_id: str) -> dict[str, str]:
        rows: dict[str, str] = self._client.hgetall(history_keys(user_id)[1])
        return rows

    def _stale(self, user_id: str, history: dict[str, str]) -> str:
        """Why a stored result does not know the user's whole history, or nothing."""
        times = [decode_event(text).ts_us for name, text in history.items() if name.startswith("e:")]
        if not times:
            return "the history is empty"
        for task in ALWAYS_ANSWERED:
            row = self._client.hmget(result_key(user_id, task), "event_ts_us", "revision")
            if row[0] is None:
                return f"{task} has no result"
            if int(row[0]) < max(times):
                return f"{task} is of {row[0]}, the newest event of {max(times)}"
            if self._exact and row[1] != history["revision"]:
                return f"{task} is of revision {row[1]}, the history of {history['revision']}"
        return ""
