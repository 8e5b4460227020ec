"""Stage `ingest`: raw logs → the canonical tables events and items.

1. Open the source: `complete_journey`, or the user's own `tables`.
2. Write events by date, and items, out of core.
3. Set aside rows that do not fit the canonical types; `validate` puts them into its quarantine.
"""

from __future__ import annotations

import pyarrow.compute as pc
import pyarrow.dataset as ds

from components.exceptions import DataError
from components.ingestion.reading import connect
from components.ingestion.rejects import write_rejected
from components.ingestion.sources import read_table, readable_errors
from components.ingestion.write import write_events, write_items
from components.storage import StageReport, StageRun


def run(stage: StageRun) -> StageReport:
    """Turn the configured source into events and items.

    Raises:
        DataError: A file or column is missing or unreadable, or no event or item can be read.
    """
    source = stage.config.source
    connection = connect(stage.scratch, stage.settings.num_threads)
    with readable_errors(source):
        readings = {name: read_table(source, name, connection) for name in ("events", "items")}
        stage.report_progress(f"writing events of {source.kind}")
        write_events(readings["events"], stage.output / "events")
        stage.report_progress("writing items")
        num_items = write_items(readings["items"], stage.output / "items.parquet")
        rejected = write_rejected(readings.values(), stage.output / "rejected.parquet")
    connection.disconnect()

    events = ds.dataset(stage.output / "events", partitioning="hive")
    counts = {
        "events": events.count_rows(),
        "users": pc.count_distinct(events.to_table(columns=["user_id"])["user_id"]).as_py(),
        "items": num_items,
    }
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
