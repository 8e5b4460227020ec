"""Stage `validate`: accepted rows for every later stage, and a quarantine with a reason for each refused row.

1. Items, then events (whose items must be among the accepted ones), each against its Great Expectations suite.
2. Refused rows, and rows that `ingest` could not read, go to the quarantine; the Data Docs show every rule.
3. Too large a share of refused rows, or a stale or shrunken table, fails the stage; quarantine and Data Docs then
   stay in the scratch folder that the error names.
"""

from __future__ import annotations

import shutil
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.exceptions import DataError, QualityError
from components.schemas.events import QUARANTINE
from components.storage import StageReport, StageRun
from components.validation.frames import Files, connect, event_frame, item_frame, open_files
from components.validation.freshness import NEWEST_EVENT, require_fresh
from components.validation.judge import Judgement, judge, open_context
from components.validation.quarantine import write_accepted, write_quarantined
from components.validation.rules import event_rules, item_rules

TABLES = ("items", "events")
_OUTPUTS = {"events": "events", "items": "items.parquet", "quarantine": "quarantine.parquet", "data_docs": "data_docs"}
_SOURCE = "source_fingerprint"


def run(stage: StageRun) -> StageReport:
    """Judge both tables and part the accepted rows from the refused ones.

    Raises:
        QualityError: Too large a share of a table is refused, or a rule about a whole table fails.
        DataError: A table is empty or no canonical table, or no row of it is accepted.
    """
    files = {table: open_files(table, stage.path("ingest", table)) for table in TABLES}
    judgements = _judge(stage, files)
    quarantine = stage.scratch / _OUTPUTS["quarantine"]
    with pq.ParquetWriter(quarantine, QUARANTINE, compression="zstd") as writer:
        writer.write_table(pq.read_table(stage.path("ingest", "rejected"), schema=QUARANTINE))
        for table in TABLES:
            write_quarantined(files[table], judgements[table].refused, writer)

    reasons = _count_reasons(quarantine)
    shares = {}
    for table in TABLES:
        _require_table_rules(table, judgements[table], stage.scratch)
        rejected = sum(reasons[table].values()) - len(judgements[table].refused)
        shares[table] = sum(reasons[table].values()) / (files[table].num_rows + rejected)
        _require_share(stage, table, shares[table], reasons[table])

    counts = {
        table: write_accepted(files[table], judgements[table].refused, stage.output / _OUTPUTS[table])
        for table in TABLES
    }
    for name in ("quarantine", "data_docs"):
        shutil.move(stage.scratch / _OUTPUTS[name], stage.output / _OUTPUTS[name])
    _require_rows(counts)
    newest = _newest(stage.output / _OUTPUTS["events"])
    require_fresh(newest, stage.config.validation, datetime.now(UTC))
    metrics = {
        "quarantined_share": shares,
        "reasons": {f"{table}.{reason}": n for table in TABLES for reason, n in sorted(reasons[table].items())},
        _SOURCE: stage.config.fingerprint(("source",)),
        NEWEST_EVENT: newest,
    }
    return StageReport(_OUTPUTS, counts | {"quarantined": sum(map(Counter.total, reasons.values()))}, metrics)


def _judge(stage: StageRun, files: dict[str, Files]) -> dict[str, Judgement]:
    data_docs = stage.scratch / _OUTPUTS["data_docs"]
    shutil.rmtree(data_docs, ignore_errors=True)
    context = open_context(data_docs)
    connection = connect(stage.scratch, stage.settings.num_threads)
    limits, now, previous = stage.config.validation, datetime.now(UTC), _previous_rows(stage)

    stage.report_progress("judging items", rows=files["items"].num_rows)
    items = item_frame(files["items"], connection)
    about_items = judge(context, "items", items, item_rules(limits, previous.get("items")))
    accepted: pd.Series[int] = items["item_id"].drop(list(about_items.refused))

    stage.report_progress("judging events", rows=files["events"].num_rows)
    events = event_frame(files["events"], accepted, connection)
    about_events = judge(context, "events", events, event_rules(limits, now, previous.get("events")))
    connection.disconnect()
    return {"items": about_items, "events": about_events}


def _previous_rows(stage: StageRun) -> dict[str, int]:
    """Accepted rows of the last run of this source; nothing to compare with if the source was another."""
    previous = stage.previous
    if previous is None or previous.metrics.get(_SOURCE) != stage.config.fingerprint(("source",)):
        return {}
    return previous.counts


def _newest(events: Path) -> str:
    """Time of the newest accepted event, ISO 8601."""
    times = [pc.max(pq.read_table(path, columns=["ts"])["ts"]).as_py() for path in events.rglob("*.parquet")]
    return str(max(times).isoformat())


def _count_reasons(quarantine: Path) -> dict[str, Counter[str]]:
    rows = pq.read_table(quarantine, columns=["table", "reason"])
    counted = rows.group_by(["table", "reason"]).aggregate([([], "count_all")]).to_pylist()
    return {
        table: Counter({row["reason"]: row["count_all"] for row in counted if row["table"] == table})
        for table in TABLES
    }


def _require_table_rules(table: str, judgement: Judgement, scratch: Path) -> None:
    for rule, observed in judgement.failed:
        raise QualityError(
            f"table {table}, rule {rule.reason}",
            expected=rule.message,
            got=observed,
            remedy=f"check the source or the limits in the section validation; see {scratch / 'data_docs/index.html'}",
        )


def _require_share(stage: StageRun, table: str, share: float, reasons: Counter[str]) -> None:
    limit = stage.config.validation.max_quarantined_share
    if share <= limit:
        return
    worst = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
    raise QualityError(
        f"table {table}, rule {reasons.most_common(1)[0][0]}",
        expected=f"at most {limit:.2%} of the rows refused",
        got=f"{share:.2%} ({worst})",
        remedy=f"see the rows in {stage.scratch / _OUTPUTS['quarantine']} and mend the source, "
        "or raise validation.max_quarantined_share",
    )


def _require_rows(counts: dict[str, int]) -> None:
    for table, accepted in counts.items():
        if not accepted:
            raise DataError(
                f"table {table}",
                expected="at least one accepted row",
                got="none",
                remedy="lower validation.max_quarantined_share to stop earlier, and mend the source",
            )
