"""A table judged in batches is judged as in one frame."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from components.config import ValidationConfig
from components.engines.duckdb import open_engine
from components.schemas.events import ITEMS
from components.settings import Settings
from components.validation.frames import Files, open_files
from components.validation.judge import judge_tables
from tests.worlds.tables import write, write_days

Make = Callable[..., dict[str, Any]]
NUM_EVENTS, NUM_ITEMS = 9_000, 5_000


def write_faulty_tables(folder: Path, event: Make, item: Make, now: datetime) -> dict[str, Files]:
    """Rows of several days and files, of which about a third break one rule or more."""
    random = np.random.default_rng(0)

    def some(good: Any, *faulty: Any) -> Any:
        return faulty[random.integers(len(faulty))] if random.random() < 0.05 else good

    items = [
        item(some(number, number // 2), title=some("Sock", "", "  "), price=some(2.5, None, -1.0, 1e9))
        for number in range(NUM_ITEMS)
    ]
    events = [
        event(
            some(f"e{number}", f"e{number // 3}", ""),
            user_id=some("u", " "),
            item_id=int(random.integers(NUM_ITEMS + 100)),
            behavior=some("view", ""),
            ts=now + timedelta(hours=some(-float(random.integers(1, 200)), 50.0)),
        )
        for number in range(NUM_EVENTS)
    ]
    write_days(folder / "events", events)
    write(folder / "items.parquet", ITEMS, items)
    return {"items": open_files("items", folder / "items.parquet"), "events": open_files("events", folder / "events")}


def test_batches_and_one_frame_agree_row_by_row(
    event: Make, item: Make, now: datetime, tmp_path: Path, settings: Settings
) -> None:
    files = write_faulty_tables(tmp_path / "tables", event, item, now)
    assert len(files["events"].paths) > 1

    def judge(batch_rows: int) -> dict[str, tuple[dict[int, list[str]], list[tuple[str, str]]]]:
        with open_engine(tmp_path / "spill", settings) as engine:
            found = judge_tables(
                files["items"],
                files["events"],
                limits=ValidationConfig(),
                previous={"events": 10 * NUM_EVENTS, "items": NUM_ITEMS},
                now=now,
                engine=engine,
                data_docs=tmp_path / f"docs-{batch_rows}",
                report=lambda message, **figures: reports.append((message, figures["done"])),
                batch_rows=batch_rows,
            )
        return {
            table: (
                {row: [rule.reason for rule in rules] for row, rules in one.refused.items()},
                [(rule.reason, observed) for rule, observed in one.failed],
            )
            for table, one in found.items()
        }

    reports: list[tuple[str, int]] = []
    whole = judge(NUM_EVENTS)
    assert len(reports) == 2
    reports.clear()
    assert judge(2048) == whole
    assert [done for message, done in reports if message == "judging events"] == [0, 2048, 4096, 6144, 8192]
    refused, failed = whole["events"]
    assert failed == [("volume", str(NUM_EVENTS))]
    assert 0.15 < len(refused) / NUM_EVENTS < 0.5
    assert {reasons[0] for reasons in refused.values()} == {
        *("duplicate_event_id", "blank_event_id", "blank_user_id", "blank_behavior", "future_ts", "unknown_item")
    }
    assert any(len(reasons) > 1 for reasons in refused.values())
