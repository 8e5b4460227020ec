"""`urm ingest --check`: what a source holds and what is wrong with it, without writing anything."""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import ibis
from rich.console import Console
from rich.table import Table

from components.config import Source
from components.engines.duckdb import open_engine
from components.engines.engine import require_duckdb
from components.exceptions import UserError
from components.ingestion.reading import Reading
from components.ingestion.rejects import quarantine_batches
from components.ingestion.sources import read_table, readable_errors
from components.settings import Settings

SHOWN_ROWS = 3
_WIDTH = 120


@dataclass(frozen=True)
class CheckReport:
    """Outcome of a check."""

    text: str  # the report, for people
    passed: bool  # whether every row of both tables can be ingested


def check_source(source: Source, settings: Settings) -> CheckReport:
    """Read both tables of a source once and report missing columns, types, null rates and the first bad rows."""
    require_duckdb("ingest", settings)
    output = io.StringIO()
    console = Console(file=output, width=_WIDTH, highlight=False, markup=False)
    with (
        tempfile.TemporaryDirectory(prefix="urm-check-") as temporary,
        open_engine(Path(temporary), settings) as engine,
    ):
        passed = [_check_table(source, name, engine, console) for name in ("events", "items")]
    console.print("passed" if all(passed) else "failed")
    return CheckReport(output.getvalue(), all(passed))


def _check_table(source: Source, name: str, connection: ibis.BaseBackend, console: Console) -> bool:
    try:
        with readable_errors(source):
            reading = read_table(source, name, connection)
            numbers = _count(reading)
            entries = _first_rejected(reading)
    except UserError as error:
        console.print(f"{name}: {error}\n", soft_wrap=True)
        return False
    console.print(f"{name}: {numbers['rows']:,} rows of {reading.origin}", soft_wrap=True)
    console.print(_column_table(reading, numbers))
    if not numbers["rows"]:
        console.print("  the table is empty\n")
        return False
    if not entries:
        return True
    console.print(f"  {numbers['rejected']:,} rows cannot be ingested; the first of them:")
    for entry in entries:
        console.print(f"  - {entry['reason']}: {entry['message']}; row {entry['row']}", soft_wrap=True)
    console.print()
    return False


def _count(reading: Reading) -> dict[str, int]:
    raw = reading.raw
    counted = {"rows": raw.count(), "rejected": raw.count(where=reading.unfit)}
    for column in reading.columns:
        counted[f"absent {column.name}"] = raw.count(where=column.absent)
        counted[f"unreadable {column.name}"] = raw.count(where=column.unreadable)
    row = raw.agg(**counted).to_pyarrow().to_pylist()[0]
    return {name: int(value or 0) for name, value in row.items()}


def _first_rejected(reading: Reading) -> list[dict[str, str]]:
    entries: list[dict[str, str]] = []
    for batch in quarantine_batches(reading, limit=SHOWN_ROWS):
        entries += batch.to_pylist()
    return entries


def _column_table(reading: Reading, numbers: dict[str, int]) -> Table:
    table = Table(box=None, padding=(0, 2), header_style="")
    for heading in ("canonical", "from", "type", "needed"):
        table.add_column(heading, overflow="fold")
    for heading in ("null", "unreadable"):
        table.add_column(heading, justify="right")
    for column in reading.columns:
        absent = numbers[f"absent {column.name}"] / max(numbers["rows"], 1)
        table.add_row(
            column.name,
            column.source,
            str(column.raw.type()),
            "yes" if column.required else "",
            f"{absent:.2%}",
            f"{numbers[f'unreadable {column.name}']:,}",
        )
    return table
