"""Freshness: no rule about the rows, which stay as they are, but about the instant at which they are used.

So it is no expectation of a suite: it is asked of the accepted rows when they are judged, and again whenever their
verdict is reused, since the files of a feed that has stopped do not change.
"""

from datetime import datetime, timedelta
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.config import ValidationConfig
from components.exceptions import QualityError

NEWEST_EVENT = "newest_event"  # metric of the stage: time of the newest accepted event, ISO 8601


def find_newest(events: Path) -> str:
    """Time of the newest event of a folder, ISO 8601."""
    times = [pc.max(pq.read_table(path, columns=["ts"])["ts"]).as_py() for path in events.rglob("*.parquet")]
    return str(max(times).isoformat())


def require_fresh(newest_event: str, limits: ValidationConfig, now: datetime) -> None:
    """Refuse a log that is too old at the instant `now`, by the time of its newest accepted event, ISO 8601.

    Raises:
        QualityError: The newest accepted event is older than `max_age_days`.
    """
    if limits.max_age_days is None:
        return
    newest, oldest = datetime.fromisoformat(newest_event), now - timedelta(days=limits.max_age_days)
    if newest < oldest:
        raise QualityError(
            "table events, rule stale",
            expected=f"a newest accepted event not before {oldest:%Y-%m-%d %H:%M:%S} UTC",
            got=f"{newest:%Y-%m-%d %H:%M:%S} UTC",
            remedy="see why no new events arrive, or change validation.max_age_days",
        )
