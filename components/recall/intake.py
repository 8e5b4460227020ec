"""Bulk feed: events of a Parquet, CSV or JSONL file into the stream, by the same door as the API's."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from pydantic import ValidationError

from components.config import RecallConfig
from components.exceptions import DataError, UnavailableError
from components.recall.events import Event, explain
from components.recall.scripts import ACCEPT, MARK_TTL_SECONDS, STREAM, accepted_key, waiting_key

_PIPELINE_EVENTS = 500
_FULL_WAIT_SECONDS = 0.5


@dataclass
class FeedReport:
    """What a bulk feed did.

    Attributes:
        accepted: Events put into the stream.
        duplicates: Events whose id was accepted before.
    """

    accepted: int = 0
    duplicates: int = 0


def accept_arguments(event: Event, config: RecallConfig, traceparent: str = "") -> dict[str, list[Any]]:
    """Keys and arguments of the script ACCEPT for one event; its entry carries the trace that it belongs to."""
    return {
        "keys": [STREAM, accepted_key(event.event_id), waiting_key(event.user_id)],
        "args": [
            event.model_dump_json(),
            f"{time.time():.6f}",
            MARK_TTL_SECONDS,
            config.max_stream_length,
            event.user_id,
            traceparent,
            event.event_id,
        ],
    }


def feed(
    client: redis.Redis, events: Iterator[Event], config: RecallConfig, full_timeout_seconds: float = 60.0
) -> FeedReport:
    """Put events into the stream in order; wait while it is full.

    Raises:
        UnavailableError: The stream stays full.
    """
    script = client.register_script(ACCEPT)
    report = FeedReport()
    for batch in _batches(events):
        deadline = time.monotonic() + full_timeout_seconds
        while batch:
            with client.pipeline(transaction=False) as pipe:
                for event in batch:
                    script(**accept_arguments(event, config), client=pipe)
                answers = pipe.execute()
            report.accepted += answers.count(1)
            report.duplicates += answers.count(0)
            refused = [event for event, answer in zip(batch, answers, strict=True) if answer == -1]
            if len(refused) < len(batch):
                deadline = time.monotonic() + full_timeout_seconds
            batch = refused
            if batch:
                _wait_for_room(deadline, config)
    return report


def read_events(path: Path, max_future_seconds: float, limit: int | None = None) -> Iterator[Event]:
    """Events of a file; columns are the event's fields, others are refused.

    Raises:
        DataError: The file cannot be read, or a row is no event; the message names the row.
    """
    for number, row in enumerate(_rows(path)):
        if limit is not None and number >= limit:
            return
        try:
            event = Event.model_validate(row)
        except ValidationError as error:
            raise DataError(f"{path}, row {number + 1}", **explain(error), remedy="correct the file") from None
        if event.is_future(max_future_seconds):
            raise DataError(
                f"{path}, row {number + 1}, field 'ts'",
                expected=f"at most {max_future_seconds:g} s in the future",
                got=event.ts.isoformat(),
                remedy="correct the file",
            )
        yield event


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    readers = {".parquet": _parquet_rows, ".csv": _csv_rows, ".jsonl": _json_rows}
    if path.suffix not in readers:
        raise DataError(
            f"event file {path}",
            expected="a .parquet, .csv or .jsonl file",
            got=path.suffix or "no suffix",
            remedy="convert it",
        )
    try:
        yield from readers[path.suffix](path)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"event file {path}", expected="readable rows", got=error, remedy="check the file") from None


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet as pq

    for batch in pq.ParquetFile(path).iter_batches():
        for row in batch.to_pylist():
            row["attributes"] = dict(row.get("attributes") or {})
            yield row


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(newline="") as stream:
        for row in csv.DictReader(stream):
            yield {name: value for name, value in row.items() if value != ""}


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as stream:
        for line in stream:
            if line.strip():
                yield json.loads(line)


def _batches(events: Iterator[Event]) -> Iterator[list[Event]]:
    batch: list[Event] = []
    for event in events:
        batch.append(event)
        if len(batch) == _PIPELINE_EVENTS:
            yield batch
            batch = []
    if batch:
        yield batch


def _wait_for_room(deadline: float, config: RecallConfig) -> None:
    if time.monotonic() > deadline:
        raise UnavailableError(
            "event stream",
            expected=f"room below {config.max_stream_length} entries",
            got="a full stream that does not shrink",
            remedy="start workers with `urm recall worker` and feed again; what was accepted is not fed twice",
        )
    time.sleep(_FULL_WAIT_SECONDS)
