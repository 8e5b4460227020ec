"""The live event: as the API accepts it, as the stream carries it, and as a user's recent history keeps it."""

import hashlib
import json
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from components.config import RecallConfig
from components.exceptions import DataError
from components.recall.state.scripts import MARK_TTL_SECONDS, STREAM, accepted_key, waiting_key

ShortText = Annotated[str, StringConstraints(min_length=1, max_length=128, strip_whitespace=True)]
# Instants are numbers of microseconds, and Redis' scripts count in doubles, which are exact below 2 ** 53.
EARLIEST, LATEST = datetime(1970, 1, 1, tzinfo=UTC), datetime(2255, 1, 1, tzinfo=UTC)


def _refuse_truth(value: Any) -> Any:
    """JSON's true and false are no numbers, though Python takes them for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = Annotated[int, BeforeValidator(_refuse_truth)]
ItemText = Annotated[str, StringConstraints(min_length=1, max_length=256)]  # as in the logs, blanks included
LongText = Annotated[str, StringConstraints(min_length=1, max_length=256, strip_whitespace=True)]

# Version of an event's form in the stream. Readers ignore fields that they do not know, so a new field needs no new
# version; whatever would make an older reader refuse or misread an event (a wider limit, another meaning) does.
VERSION = 1

EXAMPLE: dict[str, JsonValue] = {
    "event_id": "8f14e45f-ceea-467f-a0e6-1d2f6b3c9a01",
    "user_id": "1",
    "external_id": "1082185",
    "behavior": "purchase",
    "ts": "2017-12-18T17:05:00Z",
}


class Event(BaseModel):
    """Something a user did: with an item, or in words, or both.

    `event_id` makes a retry harmless: an event whose id was accepted before is not processed again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra={"examples": [EXAMPLE]})

    event_id: ShortText = Field(
        default_factory=lambda: str(uuid.uuid4()),
        description="Unique id chosen by the client, so that it may retry; made by the server if left out.",
    )
    user_id: ShortText = Field(description="The user, as in the logs the model was trained on; new users are welcome.")
    external_id: ItemText | None = Field(
        default=None,
        description="The item by the shop's own id (its SKU); may be left out if there is a query. An item that "
        "the serving release does not know gets ingest's number: if your log has numbers of its own, send item_id.",
    )
    item_id: Number | None = Field(
        default=None, ge=0, lt=2**63, description="The item by its number, in the place of external_id."
    )
    behavior: ShortText = Field(default="purchase", description="What the user did, e.g. purchase, view, search.")
    scenario: ShortText = Field(default="live", description="Where it happened.")
    query: LongText | None = Field(default=None, description="The user's words; asks the tasks that need a query.")
    ts: AwareDatetime = Field(
        default_factory=lambda: datetime.now(UTC),
        ge=EARLIEST,
        lt=LATEST,
        description="When it happened, with time zone; the server's clock if left out.",
    )
    attributes: dict[ShortText, Annotated[str, StringConstraints(max_length=256)]] = Field(
        default_factory=dict, max_length=32, description="Further facts, e.g. in_display."
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.item_id is not None and self.external_id is not None:
            raise ValueError("expected external_id or item_id, not both")
        if self.item_id is None and self.external_id is None and self.query is None:
            raise ValueError("expected external_id, item_id or query")
        return self

    def with_item(self, find: Callable[[str], int]) -> Self:
        """The event with its item's number, by a function that knows it by external id."""
        if self.external_id is None:
            return self
        return self.model_copy(update={"item_id": find(self.external_id), "external_id": None})

    @property
    def ts_us(self) -> int:
        """Microseconds since 1970."""
        return to_microseconds(self.ts)

    def is_future(self, max_future_seconds: float) -> bool:
        """Whether the event claims to lie ahead of this machine's clock by more than the skew allowed."""
        return (self.ts - datetime.now(UTC)).total_seconds() > max_future_seconds


def encode_event(event: Event) -> str:
    """The event as the stream and the histories hold it: its item by number, no attributes, which nothing reads."""
    return event.model_dump_json(exclude={"attributes", "external_id"})


def decode_event(text: str) -> Event:
    """Parse an event of the stream or of a history; fields of a newer version are ignored.

    Raises:
        DataError: It is no event.
    """
    try:
        return Event.model_validate_json(text, extra="ignore")
    except ValidationError as error:
        raise DataError("stream entry", **explain(error), remedy="correct it and feed it again") from None


def explain(error: ValidationError) -> dict[str, str]:
    """Expected and got of the first fault, for the sentence of an exception."""
    first = error.errors()[0]
    field, message = ".".join(map(str, first["loc"])), first["msg"]
    for prefix in ("Value error, ", "expected ", "Input should ", *([] if field else ["be ", "Invalid "])):
        message = message.removeprefix(prefix)  # what is not JSON at all begins with `Invalid JSON: `
    got = "nothing" if first["type"] == "missing" else repr(first["input"])
    return {
        "expected": f"field {field!r} to be right ({message})" if field else message,
        "got": got if len(got) <= 80 else got[:79] + "…",
    }


def to_microseconds(instant: datetime) -> int:
    """Microseconds since 1970, exact."""
    delta = instant - EARLIEST
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_microseconds(ts_us: int) -> datetime:
    """The instant, in UTC."""
    return datetime.fromtimestamp(ts_us // 1_000_000, UTC).replace(microsecond=ts_us % 1_000_000)


def accept_arguments(event: Event, config: RecallConfig, traceparent: str = "") -> dict[str, list[Any]]:
    """Keys and arguments of the script ACCEPT for one event; its entry carries the trace that it belongs to."""
    return {
        "keys": [STREAM, accepted_key(event.user_id, event.event_id), waiting_key(event.user_id)],
        "args": [
            encode_event(event),
            f"{time.time():.6f}",
            MARK_TTL_SECONDS,
            config.max_stream_length,
            event.user_id,
            traceparent,
            VERSION,
            config.max_waiting_per_user,
            digest_event(event),
        ],
    }


def digest_event(event: Event) -> str:
    """Digest of what the client said, by which a retry is told from another event under the same id."""
    content = event.model_dump(mode="json", exclude={"event_id", "ts", "external_id"})
    content["ts"] = event.ts_us if "ts" in event.model_fields_set else None  # a retry is given another time
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
