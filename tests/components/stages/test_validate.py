import json
import os
import socket
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import ValidationConfig, load_config
from components.exceptions import DataError, QualityError, UnavailableError
from components.schemas.events import EVENTS, ITEMS, QUARANTINE
from components.settings import Settings
from components.stages.validate import run
from components.storage import StageResult, run_stage
from components.validation.freshness import NEWEST_EVENT, require_fresh
from tests.worlds import CONFIGS
from tests.worlds.disks import fill, mount_small_disk, occupied  # noqa: F401  # fixture
from tests.worlds.validation import *  # noqa: F403  # fixtures
from tests.worlds.validation import Bench

Make = Callable[..., dict[str, Any]]
Read = Callable[[str], list[dict[str, Any]]]


def test_each_bad_row_goes_to_the_quarantine_with_its_reason(
    bench: Any, event: Make, item: Make, read_rows: Read, now: datetime
) -> None:
    faults = {  # of events: what differs from a good one, and the reason
        "blank user": ({"user_id": "  "}, "blank_user_id"),
        "blank behavior": ({"behavior": ""}, "blank_behavior"),
        "blank scenario": ({"scenario": ""}, "blank_scenario"),
        "unknown": ({"item_id": 99}, "unknown_item"),
        "of a bad item": ({"item_id": 3}, "unknown_item"),
        "future": ({"ts": now + timedelta(days=2)}, "future_ts"),
        "two faults": ({"user_id": "", "item_id": 99}, "blank_user_id"),
    }
    events = [event("good"), event("good", user_id="other"), event("", query="sock")]
    events += [event(name, **values) for name, (values, _) in faults.items()]
    items = [item(1), item(1, title="Twin"), item(2, title=" "), item(3, price=-1.0), item(4, price=2e6)]
    result = bench.run(events, [*items, item(5, price=None)], max_quarantined_share=1.0)
    quarantine = pq.read_table(result.outputs["quarantine"])
    assert quarantine.schema.equals(QUARANTINE)
    reasons = {"": "blank_event_id", "good": "duplicate_event_id"} | {name: why for name, (_, why) in faults.items()}
    of_items = {"1": "duplicate_item_id", "2": "blank_title", "3": "price_out_of_range", "4": "price_out_of_range"}
    expected = [(table, *row) for table, rows in (("events", reasons), ("items", of_items)) for row in rows.items()]
    found = [(row["table"], row["row_key"], row["reason"]) for row in quarantine.to_pylist()]
    assert sorted(found) == sorted(expected)
    by_key = {row["row_key"]: row for row in quarantine.to_pylist()}
    assert by_key["two faults"]["message"] == "user_id is blank; item_id 99 is not among the accepted items"
    assert json.loads(by_key["future"]["row"])["attributes"] == {"device": "phone"}
    assert [row["event_id"] for row in read_rows(result.outputs["events"])] == ["good"]
    assert [(row["item_id"], row["title"]) for row in read_rows(result.outputs["items"])] == [(1, "Sock"), (5, "Sock")]
    assert result.counts == {"events": 1, "items": 2, "quarantined": 13}
    assert result.metrics["reasons"]["events.unknown_item"] == 2
    assert result.metrics["quarantined_share"] == {"events": 0.9, "items": pytest.approx(4 / 6)}


def test_accepted_files_keep_the_canonical_schema(bench: Any, event: Make, item: Make) -> None:
    result = bench.run([event("a"), event("b", item_id=9)], [item()], max_quarantined_share=0.5)
    (file,) = Path(result.outputs["events"]).rglob("*.parquet")
    assert file.parent.name.startswith("date=")
    assert pq.read_schema(file).equals(EVENTS)
    assert pq.read_schema(result.outputs["items"]).equals(ITEMS)


def test_rows_that_ingest_could_not_read_count_too(bench: Any, event: Make, item: Make, read_rows: Read) -> None:
    rejected = [{"table": "events", "row_key": "x", "reason": "unreadable_ts", "message": "m", "row": "{}"}]
    result = bench.run([event("a")], [item()], rejected, max_quarantined_share=0.5)
    assert read_rows(result.outputs["quarantine"]) == rejected
    assert result.metrics["quarantined_share"]["events"] == 0.5
    with pytest.raises(QualityError, match=r"rule unreadable_ts: expected at most 1\.00% .*, got 50\.00%"):
        bench.run([event("a")], [item()], rejected)


def test_too_large_a_share_fails_and_leaves_the_rows_to_look_at(bench: Any, event: Make, item: Make) -> None:
    events = [event(f"e{number}") for number in range(20)] + [event("bad", item_id=7)]
    message = (
        r"table events, rule unknown_item: expected at most 1\.00% of the rows refused, got 4\.76% \(unknown_item 1\); "
        r"see the rows in (?P<path>\S+) and fix the source, or raise validation\.max_quarantined_share\.$"
    )
    with pytest.raises(QualityError, match=message) as caught:
        bench.run(events, [item()])
    path = Path(str(caught.value).split("see the rows in ")[1].split(" and fix")[0])
    assert pq.read_table(path)["row_key"].to_pylist() == ["bad"]
    assert (path.parent / "data_docs/index.html").is_file()
    assert not (bench.root / "run-0/validate/result.json").exists()


def test_freshness(bench: Any, event: Make, item: Make, now: datetime) -> None:
    old = [event("old", ts=now - timedelta(days=10))]
    assert bench.run(old, [item()]).counts["events"] == 1
    assert bench.run(old, [item()], max_age_days=11).counts["events"] == 1
    with pytest.raises(QualityError, match=r"rule stale: expected a newest accepted event not before .* UTC, got "):
        bench.run(old, [item()], max_age_days=9)


def test_an_event_of_the_future_makes_no_table_fresh(bench: Any, event: Make, item: Make, now: datetime) -> None:
    events = [event("old", ts=now - timedelta(days=10)), event("odd", ts=now + timedelta(days=1))]
    with pytest.raises(QualityError, match="rule stale"):
        bench.run(events, [item()], max_age_days=9, max_quarantined_share=1.0)


def test_a_verdict_of_yesterday_does_not_make_the_same_files_fresh_today(
    bench: Any, event: Make, item: Make, now: datetime
) -> None:
    events = [event("old", ts=now - timedelta(days=9)), event("odd", ts=now + timedelta(days=1))]
    newest = bench.run(events, [item()], max_age_days=9.5, max_quarantined_share=1.0).metrics[NEWEST_EVENT]
    limits = ValidationConfig(max_age_days=9.5)
    require_fresh(newest, limits, now)
    with pytest.raises(QualityError, match=r"rule stale: expected a newest accepted event not before .*, got "):
        require_fresh(newest, limits, now + timedelta(days=1))
    require_fresh(newest, ValidationConfig(), now + timedelta(days=1))


def test_volume_against_the_previous_run_of_the_same_source(bench: Any, event: Make, item: Make) -> None:
    many = [event(f"e{number}") for number in range(10)]
    bench.run(many, [item()])
    assert bench.run(many[:5], [item()]).counts["events"] == 5
    with pytest.raises(QualityError, match=r"table events, rule volume: expected at least 2 rows, .*, got 1;"):
        bench.run(many[:1], [item()])
    other = {"kind": "complete_journey", "max_users": 1}
    assert bench.run(many[:1], [item()], source=other).counts["events"] == 1
    with pytest.raises(QualityError, match="rule volume"):  # what another source had in between is no measure of it
        bench.run(many[:1], [item()])


def test_clock_skew_is_allowed(bench: Any, event: Make, item: Make) -> None:
    soon = [event("soon", ts=datetime.now(UTC) + timedelta(seconds=200))]
    assert bench.run(soon, [item()]).counts == {"events": 1, "items": 1, "quarantined": 0}
    with pytest.raises(QualityError, match="rule future_ts"):
        bench.run(soon, [item()], max_future_seconds=0)


@pytest.mark.parametrize("empty", ["events", "items"])
def test_an_empty_table(empty: str, bench: Any, event: Make, item: Make) -> None:
    tables: dict[str, Any] = {"events": [event()], "items": [item()]} | {empty: []}
    with pytest.raises(DataError, match=f"table {empty} in .*: expected at least one row, got none"):
        bench.run(**tables)


def test_no_row_left(bench: Any, event: Make, item: Make) -> None:
    with pytest.raises(DataError, match="table events: expected at least one accepted row, got none"):
        bench.run([event(item_id=5)], [item()], max_quarantined_share=1.0)


def test_data_docs_show_both_suites(bench: Any, event: Make, item: Make) -> None:
    docs = Path(bench.run([event()], [item()]).outputs["data_docs"])
    index = (docs / "index.html").read_text()
    pages = list(docs.glob("validations/*/**/*.html"))
    assert {page.relative_to(docs).parts[1] for page in pages} == {"events", "items"}
    assert all(page.name in index for page in pages)
    assert any("reason code: unknown_item" in page.read_text() for page in docs.rglob("*.html"))


def test_nothing_is_written_elsewhere_and_nothing_is_sent(
    bench: Any, event: Make, item: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, work = tmp_path / "user", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)

    def refuse(_self: socket.socket, address: object) -> None:
        raise AssertionError(f"connection to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    bench.run([event()], [item()])
    assert os.listdir(home) == os.listdir(work) == []
    assert {path.name for path in bench.root.iterdir()} == {"run-0", ".stages"}


def test_a_file_of_another_schema(bench: Any, event: Make, item: Make) -> None:
    wrong = EVENTS.set(EVENTS.get_field_index("item_id"), pa.field("item_id", pa.string(), nullable=False))
    with pytest.raises(DataError, match="expected the columns of the canonical events, got others in item_id"):
        bench.run([event(item_id="1")], [item()], schema=wrong)


@pytest.mark.parametrize("with_static_files", [False, True])
def test_a_full_disk_is_one_sentence_and_costs_no_earlier_rows(
    with_static_files: bool,
    small_disk: Path,
    settings: Settings,
    event: Make,
    item: Make,
    read_rows: Read,
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench(small_disk / "runs", settings)
    events = [event(f"e{number}", user_id="user" if number else "") for number in range(20)]
    first = bench.run(events, [item()], max_quarantined_share=1.0)
    # With the static files of the Data Docs, but not with a page of them: Great Expectations would go on without it.
    left = (128 << 10) + occupied(Path(first.outputs["data_docs"]) / "static") if with_static_files else 0
    filler = fill(small_disk, left)

    def validate() -> StageResult:
        overrides: dict[str, Any] = {"source": {"kind": "complete_journey"}, "validation.max_quarantined_share": 1.0}
        config, run_dir = load_config(CONFIGS / "complete_journey.yaml", overrides), str(bench.root / "run-0")
        return run_stage("validate", run, config=config, run_dir=run_dir, settings=settings, force=True)

    with pytest.raises(UnavailableError, match=r"^disk of .*: expected room .*, got a full disk; free it, .*\.$"):
        validate()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(read_rows(first.outputs["events"])) == first.counts["events"] == 19
    filler.unlink()
    assert validate().counts == first.counts
