"""Bodies that the API answers with, and the question of an ad-hoc recall."""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from components.recall.state.events import Event, LongText, ShortText


class RecalledItem(BaseModel):
    """One recalled item."""

    external_id: str | None = Field(
        default=None, description="The shop's own id. Null if the serving release does not know the item."
    )
    item_id: int = Field(description="Its number. Of an id that is no number, it is beyond what JavaScript keeps.")
    score: float = Field(description="Comparable within one answer only.")
    title: str | None = Field(description="Null if the serving release does not know the item.")
    category: list[str] = Field(description="Top to leaf.")


class RecallAnswer(BaseModel):
    """The recalled items of a user for one task."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "user_id": "1",
                    "task": "next_purchase",
                    "source": "model",
                    "release": "urm-3f1c0a9b2d4e",
                    "event_id": "8f14e45f-ceea-467f-a0e6-1d2f6b3c9a01",
                    "event_ts": "2017-12-18T17:05:00Z",
                    "computed_at": "2026-11-25T13:40:02.120Z",
                    "query": None,
                    "items": [
                        {
                            "external_id": "1082185",
                            "item_id": 1082185,
                            "score": 7.31,
                            "title": "Tropical fruit, bananas, 40 lb",
                            "category": ["PRODUCE", "TROPICAL FRUIT", "BANANAS"],
                        }
                    ],
                }
            ]
        }
    )

    user_id: str
    task: str
    source: Literal["model", "fallback"] = Field(
        description="`model`: computed for this user. `fallback`: no result yet, these items are popular for the task."
    )
    release: str = Field(description="The release that computed the items, or whose fallback it is.")
    event_id: str | None = Field(description="The user's newest live event that the result knows; null for none.")
    event_ts: datetime | None = Field(description="When that event happened.")
    computed_at: datetime | None = Field(description="When the result was computed.")
    query: str | None = Field(description="The words that the result answers, for tasks that need them.")
    items: list[RecalledItem] = Field(description="Best first.")


class AdHocQuestion(BaseModel):
    """What to recall for whom, now; the API adds k, whose limit is the configuration's."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [{"user_id": "1", "task": "next_purchase", "guidance": "gift for a child", "k": 10}]
        },
    )

    user_id: ShortText = Field(description="Any user; one without a history is taken as new.")
    task: ShortText | None = Field(default=None, description="A task of the serving release; its first if left out.")
    query: LongText | None = Field(default=None, description="The user's words; for tasks that need a query.")
    guidance: LongText | None = Field(default=None, description="Words that steer the recall.")


class AdHocAnswer(RecallAnswer):
    """What the model recalls for a user now."""

    source: Literal["model"] = Field(description="Always `model`: an ad-hoc request has no fallback.")
    event_id: str | None = Field(description="The user's newest live event; null if there is none.")
    guidance: str | None = Field(description="The words that steered the recall.")


class RecallAnswers(BaseModel):
    """The answers to a batch, in the order of the users."""

    answers: list[RecallAnswer]


class ListedEvent(Event):
    """An event in a list; it names itself, so that the list may be sent again."""

    event_id: ShortText = Field(description="Chosen by the client, unique per user.")


class EventOutcome(BaseModel):
    """What became of one event."""

    event_id: str | None = Field(description="Null if none could be read.")
    status: Literal["accepted", "duplicate", "refused"] = Field(
        description="`duplicate`: this event was accepted before and is not processed again."
    )
    type: str | None = Field(default=None, description="Of a refused event, the type of the problem.")
    detail: str | None = Field(default=None, description="Of a refused event, what was expected, and what came.")


class EventOutcomes(BaseModel):
    """What became of the events, in the order given."""

    accepted: int
    duplicates: int
    refused: int
    events: list[EventOutcome]


class EventLineage(BaseModel):
    """What became of an accepted event."""

    event_id: str
    user_id: str
    state: Literal["waiting", "done", "dead"] = Field(
        description="`waiting`: not processed yet. `done`: its user's results were computed with it. `dead`: given up."
    )
    accepted_at: datetime | None = Field(description="Null a day after its acceptance, when only the history is left.")
    finished_at: datetime | None = Field(description="When it was done or given up.")
    batch: str | None = Field(description="The worker's batch, as its log names it.")
    release: str | None = Field(description="The release that processed it.")
    in_history: bool = Field(description="Whether it is in the user's live history.")
    tasks: list[str] = Field(description="Tasks whose stored result was computed with it, as far as it is known.")

    @classmethod
    def of_mark(cls, mark: Mapping[str, str], **rest: Any) -> Self:
        """Read the mark that acceptance and the worker left; empty if it has expired."""
        finished = mark.get("done") or mark.get("dead")
        return cls(
            state="dead" if "dead" in mark else "done" if finished or not mark else "waiting",
            accepted_at=_instant(int(mark["entry"].split("-")[0]) / 1000) if mark else None,
            finished_at=_instant(float(finished)) if finished else None,
            batch=mark.get("batch"),
            release=mark.get("release"),
            **rest,
        )


def _instant(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


class Health(BaseModel):
    """State of the service."""

    status: Literal["ok"]
    release: str | None = None
    workers: int | None = Field(default=None, description="Workers with a fresh heartbeat.")


class TaskList(BaseModel):
    """Tasks of the serving release."""

    release: str
    tasks: list[str]
    query_tasks: list[str] = Field(description="Those of them that need a query.")
