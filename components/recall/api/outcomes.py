"""What became of the events of one request: accepted, known already, or refused and why."""

from collections.abc import Sequence

from pydantic import ValidationError

from components.config import RecallConfig
from components.recall.api import problems
from components.recall.api.problem_types import MAX_FAULTS, Fault
from components.recall.api.problems import ApiError
from components.recall.api.responses import EventOutcome
from components.recall.state.events import Event

# By the answer of the script ACCEPT.
OUTCOMES = {1: "accepted", 0: "duplicate", -1: "refused", -2: "user_refused", -3: "conflict"}


def refuse(number: int, event: Event | ValidationError, config: RecallConfig) -> ApiError | None:
    """Why an event cannot be accepted, if it cannot."""
    if isinstance(event, ValidationError):
        faults = problems.explain([{**error, "loc": ("body", number, *error["loc"])} for error in event.errors()])
        return ApiError.of_faults(faults)
    if not event.is_future(config.max_future_seconds):
        return None
    return ApiError(
        "invalid-request",
        f"event {event.event_id!r}, field 'ts'",
        expected=f"at most {config.max_future_seconds:g} s in the future",
        got=event.ts.isoformat(),
        remedy="correct the client's clock or leave ts out",
    )


def refuse_answer(event: Event, answer: int, config: RecallConfig) -> ApiError:
    """What a negative answer of the script ACCEPT says."""
    later = "send it again after the time in Retry-After"
    limit, user_limit = config.max_stream_length, config.max_waiting_per_user
    code, expected, got, remedy = {
        -1: ("stream-full", f"room below {limit} waiting events", "a full stream", later),
        -2: ("user-backlog-full", f"fewer than {user_limit} waiting events of its user", "as many", later),
        -3: (
            "event-conflict",
            "the content that was accepted under this id",
            "another",
            "send a new event under a new id",
        ),
    }[answer]
    return ApiError(code, f"event {event.event_id!r}", expected=expected, got=got, remedy=remedy)


def merge(refusals: dict[int, ApiError], batch: Sequence[Event | ValidationError]) -> ApiError:
    """One problem for a request of which nothing was taken: the kind with the highest status, and every refusal."""
    events = [describe(event, None, refusals[number]) for number, event in enumerate(batch)]
    worst = max(refusals.values(), key=lambda error: error.status)
    worst.errors = [
        fault
        for number, error in refusals.items()
        for fault in (error.errors or [Fault(place="body", field=str(number), detail=str(error))])
    ][:MAX_FAULTS]
    worst.events = events
    return worst


def describe(event: Event | ValidationError, answer: int | None, refusal: ApiError | None) -> EventOutcome:
    """What the answer says of one event: accepted or not by the store's answer, or refused and why."""
    event_id = None if isinstance(event, ValidationError) else event.event_id
    if refusal is not None:
        return EventOutcome(event_id=event_id, status="refused", type=refusal.type, detail=str(refusal))
    return EventOutcome(event_id=event_id, status="accepted" if answer else "duplicate")
