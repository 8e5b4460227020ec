"""Lineage of one event, for `urm recall trace`: from its acceptance to the results that include it."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import redis
from rich.console import Group, RenderableType

from components.addresses import join, read_json
from components.exceptions import DataError, UrmError
from components.recall.operate.deadletters import DeadLetter, find_letter
from components.recall.operate.terminal import make_table, show
from components.recall.state.scripts import GROUP, STREAM, accepted_key, history_keys, result_key
from components.recall.state.store import Result
from components.recall.state.stream import is_group_gone
from components.release.publication import SERVING, read_publication


@dataclass(frozen=True)
class SeenResult:
    """What the stored result of a task has to do with the event.

    Attributes:
        task: Name of the task.
        relation: In words.
        result: The result; None if there is none.
        order: Number of the publication of its release.
        revision: Of the history that it was computed from.
    """

    task: str
    relation: str
    result: Result | None = None
    order: int = 0
    revision: int = 0


@dataclass(frozen=True)
class Trace:
    """What became of an event.

    Attributes:
        event_id: The event.
        user_id: Its user.
        accepted: When and as which entry, in words.
        state: Where it is now, in words.
        history: Whether the user's live history has it, in words.
        results: By task of the serving release.
    """

    event_id: str
    user_id: str
    accepted: str
    state: str
    history: str
    results: tuple[SeenResult, ...]


def read_tasks(client: redis.Redis) -> tuple[str, ...]:
    """Names of the serving release's tasks; none if there is no such release, or its bundle is out of reach."""
    publication = read_publication(client, SERVING)
    try:
        content = None if publication is None else read_json(join(publication.bundle, "tasks.json"))
    except UrmError:
        content = None
    return tuple(task["name"] for task in content or [])


def trace_event(client: redis.Redis, event_id: str, tasks: Sequence[str], user_id: str) -> Trace:
    """Follow an event.

    Args:
        client: Returns str.
        event_id: The event.
        tasks: Whose results are looked at.
        user_id: Its user; ids are unique per user.

    Raises:
        DataError: Nothing is known of such an event.
    """
    mark: Any = client.hgetall(accepted_key(user_id, event_id))
    letter = find_letter(client, user_id, event_id) if not mark or "dead" in mark else None
    remembered = bool(client.hexists(history_keys(user_id)[1], f"e:{event_id}"))
    if not mark and letter is None and not remembered:
        raise DataError(
            f"event {event_id!r} of user {user_id!r}",
            expected="an event accepted within a day, one in the dead letters, or one in the user's history",
            got="none of this id",
            remedy="check both ids",
        )
    return Trace(
        event_id=event_id,
        user_id=user_id,
        accepted=f"{_entry_time(mark['entry'])}, entry {mark['entry']}" if mark else "more than a day ago",
        state=_state(client, mark, letter),
        history="in the user's live history" if remembered else "not in the user's live history",
        results=tuple(_see(client, event_id, user_id, task, mark, remembered) for task in tasks),
    )


def describe_trace(trace: Trace) -> RenderableType:
    """The trace as text and a table."""
    lines = [
        f"event     {trace.event_id} of user {trace.user_id}",
        f"accepted  {trace.accepted}",
        f"state     {trace.state}",
        f"history   {trace.history}",
    ]
    if not trace.results:
        lines.append("results   unknown: no release is serving, or its bundle cannot be read from here")
        return Group(*map(show, lines))
    table = make_table("task", "result", "computed at", "release", "order", "revision")
    for seen in trace.results:
        if seen.result is None:
            table.add_row(seen.task, seen.relation)
        else:
            at = seen.result.computed_at.isoformat(timespec="milliseconds")
            relation = show(seen.relation)
            table.add_row(seen.task, relation, at, seen.result.release, str(seen.order), str(seen.revision))
    return Group(*map(show, lines), table)


def _state(client: redis.Redis, mark: dict[str, str], letter: DeadLetter | None) -> str:
    if letter is not None:
        return (
            f"dead letter {letter.letter_id} since {_time(letter.at)} after {letter.deliveries} tries: {letter.reason}"
        )
    if not mark:
        return "its mark has expired; a worker has taken it into the history"
    if "dead" in mark:
        return f"given up at {_time(_instant(mark['dead']))}; its dead letter has been dropped"
    if "done" in mark:
        by = f" in batch {mark['batch']} with release {mark['release']}" if "batch" in mark else ""
        return f"done at {_time(_instant(mark['done']))}{by}"
    return _state_in_stream(client, mark["entry"])


def _state_in_stream(client: redis.Redis, entry: str) -> str:
    if not client.xrange(STREAM, min=entry, max=entry):
        return "gone from the stream without a result: Redis lost it, or somebody deleted it"
    try:
        pending: Any = client.xpending_range(STREAM, GROUP, min=entry, max=entry, count=1)
    except redis.ResponseError as error:
        if not is_group_gone(error):
            raise
        pending = []
    if not pending:
        return "waiting in the stream; no worker has taken it yet"
    (row,) = pending
    idle = row["time_since_delivered"] / 1000
    return f"pending at worker {row['consumer']}, deliveries: {row['times_delivered']}, the last {idle:.1f} s ago"


def _see(
    client: redis.Redis, event_id: str, user_id: str, task: str, mark: dict[str, str], remembered: bool
) -> SeenResult:
    fields: Any = client.hgetall(result_key(user_id, task))
    if not fields:
        return SeenResult(task, "none stored")
    result, revision = Result.model_validate_json(fields["body"]), int(fields["revision"])
    known_from = int(mark["revision"]) if "revision" in mark else None
    if result.event_id == event_id:
        relation = "visible: it is the newest event of this result"
    elif result.event_ts is None:
        relation = "does not know it; a back-fill computed it before there was any live event"
    elif remembered and known_from is not None and revision >= known_from:
        relation = f"superseded: the result of event {result.event_id} of {_time(result.event_ts)} knows it, too"
    elif remembered and not mark:
        relation = f"superseded by that of event {result.event_id} of {_time(result.event_ts)}"
    else:
        relation = f"does not know it; newest event {result.event_id} of {_time(result.event_ts)}"
    return SeenResult(task, relation, result, int(fields["release_order"]), revision)


def _entry_time(entry: str) -> str:
    return _time(_instant(int(entry.split("-")[0]) / 1000))


def _instant(seconds: str | float) -> datetime:
    return datetime.fromtimestamp(float(seconds), UTC)


def _time(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
