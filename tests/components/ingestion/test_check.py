from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from components.cli.app import app
from components.config import CompleteJourneySource
from components.ingestion.check import check_source
from components.settings import Settings
from tests.worlds import REPOSITORY
from tests.worlds.ingestion import write_csv


def line(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.strip().startswith(start)).split()


def test_a_good_source_passes(slice_dir: Path, settings: Settings) -> None:
    report = check_source(CompleteJourneySource(data_dir=slice_dir), settings)
    assert report.passed
    assert report.text.rstrip().endswith("passed")
    assert line(report.text, "ts ") == ["ts", "transaction_timestamp", "timestamp('UTC',", "6)", "yes", "0.00%", "0"]


def test_null_rates_types_and_first_bad_rows(tmp_path: Path, settings: Settings) -> None:
    header = "user_id,item_id,behavior,scenario,query,ts\n"
    bad = "".join(f"u{number},1,view,web,,never\n" for number in range(5))
    report = check_source(write_csv(tmp_path, header + "u9,1,view,web,sock,2024-05-06\n" + bad), settings)
    assert not report.passed
    assert "events: 6 rows" in report.text
    assert line(report.text, "query ") == ["query", "query", "string", "83.33%", "0"]
    assert line(report.text, "ts ") == ["ts", "ts", "string", "yes", "0.00%", "5"]
    assert "5 rows cannot be ingested" in report.text
    assert report.text.count("unreadable_ts: ts cannot be read from ts = 'never'; row {") == 3


def test_both_tables_are_reported_although_the_first_has_no_columns(tmp_path: Path, settings: Settings) -> None:
    report = check_source(write_csv(tmp_path, "who,what\n1,2\n", "id,name\n1,Sock\n"), settings)
    assert not report.passed
    assert "events: source.events" in report.text
    assert "column(s) user_id, item_id, behavior, scenario, ts, got only who, what" in report.text
    assert "column(s) item_id, title, got only id, name" in report.text


def test_an_empty_table_fails(tmp_path: Path, settings: Settings) -> None:
    report = check_source(write_csv(tmp_path, "user_id,item_id,behavior,scenario,ts\n"), settings)
    assert not report.passed
    assert "the table is empty" in report.text


@pytest.mark.parametrize(("title", "code"), [("Sock", 0), ("", 2)])
def test_the_command_exits_with_the_verdict(title: str, code: int, tmp_path: Path) -> None:
    events = "user_id,item_id,behavior,scenario,ts\nu,1,view,web,2024-05-06\n"
    source = write_csv(tmp_path, events, f"item_id,title\n1,{title}\n")
    config = REPOSITORY / "configs/complete_journey.yaml"
    kind = f"source={{kind: tables, events: {source.events}, items: {source.items}}}"
    result = CliRunner().invoke(app, ["ingest", "--check", "--config", str(config), "--set", kind])
    structlog.reset_defaults()  # the command's log went to the runner's stream, which is closed now
    assert result.exit_code == code, result.output
