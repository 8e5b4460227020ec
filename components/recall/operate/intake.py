"""Bulk feed: events of a Parquet, CSV or JSONL file into the stream, by the same script as the API's."""

import codecs
import csv
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import redis
from pydantic import ValidationError

from components.config import RecallConfig
from components.exceptions import DataError, UnavailableError
from components.recall.serving.catalogue import load_catalogue
from components.recall.state.events import Event, accept_arguments, explain
from components.recall.state.scripts import ACCEPT
from components.release.publication import SERVING, read_publication
from components.schemas.item_keys import item_key
from components.settings import Settings

_PIPELINE_EVENTS = 500
_FULL_WAIT_SECONDS = 0.5
_SHOWN_REFUSALS = 20


@dataclass
class FeedReport:
    """What a bulk feed did.

    Attributes:
        accepted: Events put into the stream.
        duplicates: Events whose id was accepted before.
        conflicts: Ids that were accepted before with another content; these events are left out.
    """

    accepted: int = 0
    duplicates: int = 0
    conflicts: list[str] = field(default_factory=list)


def read_finder(client: redis.Redis, settings: Settings) -> Callable[[str], int]:
    """Number of an item by its external id: by the serving release's titles, without a release by ingest's rule."""
    publication = read_publication(client, SERVING)
    return load_catalogue(publication, settings).find if publication else item_key


def feed(
    client: redis.Redis,
    events: Iterator[Event],
    config: RecallConfig,
    full_timeout_seconds: float = 60.0,
    find: Callable[[str], int] = item_key,
) -> FeedReport:
    """Put events into the stream in order; wait while it is full. `find` knows an item's number by its external id.

    Raises:
        UnavailableError: The stream stays full.
    """
    script = client.register_script(ACCEPT)
    report = FeedReport()
    while batch := [event.with_item(find) for event in islice(events, _PIPELINE_EVENTS)]:
        deadline = time.monotonic() + full_timeout_seconds
        while batch:
            # In one transaction, so that no worker makes room in between: what is refused is the end of the batch, or
            # of a user's events in it, and the order of a user's events stays.
            with client.pipeline(transaction=True) as pipe:
                for event in batch:
                    script(**accept_arguments(event, config), client=pipe)
                answers = pipe.execute()
            report.accepted += answers.count(1)
            report.duplicates += answers.count(0)
            report.conflicts += [one.event_id for one, answer in zip(batch, answers, strict=True) if answer == -3]
            refused = [event for event, answer in zip(batch, answers, strict=True) if answer in (-1, -2)]
            if len(refused) < len(batch):
                deadline = time.monotonic() + full_timeout_seconds
            batch = refused
            if batch:
                _wait_for_room(deadline, config)
    return report


class Refusals:
    """Rows of a file that are no events: the first 20 are reported individually, all are counted."""

    def __init__(self, report: Callable[[str], None]) -> None:
        """Take what shows a sentence to a person."""
        self.count = 0
        self._report = report

    def add(self, error: DataError) -> None:
        """Note a row."""
        self.count += 1
        if self.count <= _SHOWN_REFUSALS:
            self._report(str(error))

    def add_conflict(self, event_id: str) -> None:
        """Note an event whose id was taken."""
        expected, remedy = "an id of its own, or the content that was accepted under it", "correct the file"
        self.add(DataError(f"event {event_id!r}", expected=expected, got="another content", remedy=remedy))

    def require_none(self, path: Path) -> None:
        """Raise a DataError if there were any."""
        if self.count:
            raise DataError(
                f"{path}",
                expected="an event in every row",
                got=f"{self.count} without; the others are fed",
                remedy="correct them and feed the file again: what was accepted is not fed twice",
            )


def read_events(path: Path, max_future_seconds: float, refusals: Refusals, limit: int | None = None) -> Iterator[Event]:
    """Events of a file; columns are the event's fields, others are refused.

    Every row needs an `event_id`: without it, feeding the file again would count its events twice.

    Args:
        path: Parquet, CSV or JSONL.
        max_future_seconds: Clock skew allowed.
        refusals: Gets rows that are no event, each named by its number; of a text file, that of its line.
        limit: Read the first rows only.

    Raises:
        DataError: The file cannot be read.
    """
    for count, (place, row) in enumerate(_rows(path)):
        if count == limit:
            return
        try:
            yield _read_event(f"{path}, {place}", row, max_future_seconds)
        except DataError as error:
            refusals.add(error)


def _read_event(place: str, row: dict[str, Any] | bytes, max_future_seconds: float) -> Event:
    try:
        event = Event.model_validate_json(row) if isinstance(row, bytes) else Event.model_validate(row)
    except ValidationError as error:
        raise DataError(place, **explain(error), remedy="correct the file") from None
    if "event_id" not in event.model_fields_set:
        raise DataError(
            f"{place}, field 'event_id'", expected="an id of the event's own", got="none", remedy="correct the file"
        )
    if event.is_future(max_future_seconds):
        raise DataError(
            f"{place}, field 'ts'",
            expected=f"at most {max_future_seconds:g} s in the future",
            got=event.ts.isoformat(),
            remedy="correct the file",
        )
    return event


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | bytes]]:
    readers: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
        ".parquet": _parquet_rows,
        ".csv": _csv_rows,
        ".jsonl": _json_rows,
    }
    if path.suffix not in readers:
        raise DataError(
            f"event file {path}",
            expected="a .parquet, .csv or .jsonl file",
            got=path.suffix or "no suffix",
            remedy="convert it",
        )
    try:
        yield from readers[path.suffix](path)
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"event file {path}", expected="readable rows", got=error, remedy="check the file") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow.parquet as pq

    number = 0
    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            number += 1
            row["attributes"] = dict(row.get("attributes") or {})
            yield f"row {number}", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Bytes that are no text spoil their own row: the event refuses the surrogates they become.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.DictReader(stream, restkey="beyond the header")
        for row in reader:
            yield f"line {reader.line_num}", {name: value for name, value in row.items() if value not in ("", None)}


def _json_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if text.strip():
                yield f"line {number}", text


def _wait_for_room(deadline: float, config: RecallConfig) -> None:
    if time.monotonic() > deadline:
        raise UnavailableError(
            "event stream",
            expected=f"room below {config.max_stream_length} entries, and {config.max_waiting_per_user} per user",
            got="none, and it does not shrink",
            remedy="start workers with `urm recall worker` and feed again; what was accepted is not fed twice",
        )
    time.sleep(_FULL_WAIT_SECONDS)
