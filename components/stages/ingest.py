"""Stage `ingest`: raw logs → the canonical tables events and items.

1. Open the source: `complete_journey`, public `sequences`, or the user's own `tables`.
2. Write events by date, and items; a log larger than memory comes in parts by time.
3. Set aside rows that do not fit the canonical types; `validate` puts them into its quarantine.
"""

from pathlib import Path

import ibis

from components.engines.duckdb import open_engine
from components.engines.engine import require_duckdb
from components.exceptions import DataError
from components.ingestion.parts import split_by_time
from components.ingestion.rejects import write_rejected
from components.ingestion.sources import read_table, readable_errors
from components.ingestion.write import write_events, write_items
from components.storage import StageReport, StageRun


def run(stage: StageRun) -> StageReport:
    """Turn the configured source into events and items.

    Raises:
        DataError: A file or column is missing or unreadable, or no event or item can be read.
    """
    require_duckdb("ingest", stage.settings)
    source = stage.config.source
    with open_engine(stage.scratch / "duckdb", stage.settings) as engine, readable_errors(source):
        readings = {name: read_table(source, name, engine) for name in ("events", "items")}
        stage.report_progress(f"reading events of {source.kind}")
        parts = split_by_time(readings["events"], engine, stage.scratch / "parts")
        written = {"events": write_events(parts, stage.output / "events", stage.report_progress)}
        stage.report_progress("writing items")
        written["items"] = write_items(readings["items"], stage.output / "items.parquet", stage.report_progress)
        tables = {"events": parts, "items": [readings["items"]]}
        rejected = write_rejected(tables, written, stage.output / "rejected.parquet")
        num_users = _count_users(stage.output / "events", engine)

    counts = {"events": written["events"], "users": num_users, "items": written["items"]}
    for name in ("events", "items"):
        if counts[name] == 0:
            raise DataError(
                f"source {source.kind}, {name} of {readings[name].origin}",
                expected="at least one readable row",
                got=f"none, and {rejected[name]} unreadable",
                remedy="run `urm ingest --check` to see why",
            )
    outputs = {"events": "events", "items": "items.parquet", "rejected": "rejected.parquet"}
    return StageReport(outputs=outputs, counts=counts | {"rejected": sum(rejected.values())})


def _count_users(folder: Path, engine: ibis.BaseBackend) -> int:
    """Distinct users of the written files."""
    files = [str(path) for path in folder.rglob("*.parquet")]
    return int(engine.read_parquet(files).user_id.nunique().execute()) if files else 0
