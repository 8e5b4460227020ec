"""Stage `validate`: accepted rows for every later stage, and a quarantine with a reason for each refused row.

1. Items, then events (whose items must be among the accepted ones), each against its Great Expectations suite.
2. Refused rows, and rows that `ingest` could not read, go to the quarantine; the Data Docs show every rule.
3. Too large a share of refused rows, or a stale or shrunken table, fails the stage; quarantine and Data Docs then
   stay in the scratch folder that the error names.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime

import ibis
import pyarrow as pa
import pyarrow.parquet as pq

from components.engines.engine import open_engine
from components.schemas.events import QUARANTINE
from components.storage import StageReport, StageRun
from components.validation.frames import Files, open_files
from components.validation.freshness import NEWEST_EVENT, find_newest, require_fresh
from components.validation.judge import Judgement, judge_tables
from components.validation.limits import require_rows, require_share, require_table_rules
from components.validation.quarantine import count_reasons, write_accepted, write_quarantined

_OUTPUTS = {"events": "events", "items": "items.parquet", "quarantine": "quarantine.parquet", "data_docs": "data_docs"}


@dataclass(frozen=True)
class ValidateInputs:
    """The tables of `ingest`: items and events by name, and the rows that it could not read."""

    files: dict[str, Files]
    rejected: pa.Table

    @classmethod
    def read(cls, stage: StageRun) -> ValidateInputs:
        """Take them from the earlier stage.

        Raises:
            DataError: A table is empty or no canonical table.
        """
        files = {table: open_files(table, stage.path("ingest", table)) for table in ("items", "events")}
        return cls(files, pq.read_table(stage.path("ingest", "rejected"), schema=QUARANTINE))


def run(stage: StageRun) -> StageReport:
    """Judge both tables and split the accepted rows from the refused ones.

    Raises:
        QualityError: Too large a share of a table is refused, or a rule about a whole table fails.
        DataError: A table is empty or no canonical table, or no row of it is accepted.
    """
    # All of it beside the engine, which says in one sentence that memory or disk gave out.
    with open_engine(stage.scratch / "duckdb", stage.settings) as engine:
        return _validate(stage, engine)


def _validate(stage: StageRun, engine: ibis.BaseBackend) -> StageReport:
    inputs, limits, now = ValidateInputs.read(stage), stage.config.validation, datetime.now(UTC)
    judgements = _judge(stage, inputs, engine, now)
    quarantine, data_docs = stage.scratch / _OUTPUTS["quarantine"], stage.scratch / _OUTPUTS["data_docs"]
    with pq.ParquetWriter(quarantine, QUARANTINE, compression="zstd") as writer:
        writer.write_table(inputs.rejected)
        for table, files in inputs.files.items():
            write_quarantined(files, judgements[table].refused, writer)

    reasons, shares = count_reasons(quarantine, inputs.files), {}
    for table, files in inputs.files.items():
        require_table_rules(table, judgements[table], data_docs)
        rejected = reasons[table].total() - len(judgements[table].refused)
        shares[table] = reasons[table].total() / (files.num_rows + rejected)
        require_share(table, shares[table], reasons[table], limits, quarantine)

    counts = {
        table: write_accepted(files, judgements[table].refused, stage.output / _OUTPUTS[table])
        for table, files in inputs.files.items()
    }
    for name in ("quarantine", "data_docs"):
        shutil.move(stage.scratch / _OUTPUTS[name], stage.output / _OUTPUTS[name])
    require_rows(counts)
    newest = find_newest(stage.output / _OUTPUTS["events"])
    require_fresh(newest, limits, datetime.now(UTC))
    metrics = {
        "quarantined_share": shares,
        "reasons": {f"{table}.{reason}": n for table in shares for reason, n in sorted(reasons[table].items())},
        NEWEST_EVENT: newest,
    }
    return StageReport(_OUTPUTS, counts | {"quarantined": sum(map(Counter.total, reasons.values()))}, metrics)


def _judge(stage: StageRun, inputs: ValidateInputs, engine: ibis.BaseBackend, now: datetime) -> dict[str, Judgement]:
    data_docs = stage.scratch / _OUTPUTS["data_docs"]
    shutil.rmtree(data_docs, ignore_errors=True)
    return judge_tables(
        inputs.files["items"],
        inputs.files["events"],
        limits=stage.config.validation,
        previous=stage.previous.counts if stage.previous else {},  # of the same source
        now=now,
        engine=engine,
        data_docs=data_docs,
        report=stage.report_progress,
    )
