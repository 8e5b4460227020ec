"""Kinds of problems, and the document that is the body of every error; the client reads it without a server's code."""

from pydantic import BaseModel, ConfigDict, Field

from components.recall.api.responses import EventOutcome

TYPE = "urn:problem-type:urm:"
MAX_FAULTS = 100
# Kinds of problems, with their status. Those of 429 and 503 pass, and have a Retry-After.
CODES = {
    "not-json": 400,
    "no-token": 401,
    "missing-scope": 403,
    "unknown-path": 404,
    "unknown-task": 404,
    "unknown-event": 404,
    "wrong-method": 405,
    "event-conflict": 409,
    "body-too-large": 413,
    "invalid-request": 422,
    "stream-full": 429,
    "user-backlog-full": 429,
    "rate-limited": 429,
    "ad-hoc-queue-full": 429,
    "server-error": 500,
    "redis-unavailable": 503,
    "no-release": 503,
    "release-unreadable": 503,
    "no-ad-hoc-worker": 503,
    "ad-hoc-timeout": 504,
}


class Fault(BaseModel):
    """One thing that is wrong with a request."""

    place: str = Field(description="body, query, path or header.")
    field: str = Field(description="Its path in that place, e.g. `0.user_id` in a list of events.")
    detail: str = Field(description="What was expected and what came.")


class Problem(BaseModel):
    """Body of every error."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": TYPE + "unknown-task",
                    "title": "Unknown task",
                    "status": 404,
                    "detail": "task: expected one of next_purchase, repurchase, got 'gift'; name a known task.",
                    "errors": [],
                    "events": [],
                }
            ]
        }
    )

    type: str = Field(description=f"The kind: `{TYPE}` and one of {', '.join(CODES)}.")
    title: str = Field(description="The kind in words.")
    status: int
    detail: str = Field(description="One sentence: subject, what was expected, what came, what to do.")
    errors: list[Fault] = Field(description=f"Of an invalid request everything that is wrong, at most {MAX_FAULTS}.")
    events: list[EventOutcome] = Field(
        default=[], description="Of a list of events of which none was taken, what became of each."
    )
