import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from components.config import CompleteJourneySource, RunConfig, Source, TableSource
from components.exceptions import DataError
from components.ingestion.parts import split_by_time
from components.ingestion.reading import Reading
from components.schemas.events import EVENTS, ITEMS, QUARANTINE
from components.settings import Settings
from components.stages.ingest import run
from components.storage import StageResult, run_stage
from tests.worlds.ingestion import *  # noqa: F403  # fixtures
from tests.worlds.ingestion import write_csv

Ingest = Callable[[Source], StageResult]


@pytest.fixture
def ingest(configure: Callable[..., RunConfig], settings: Settings, tmp_path: Path) -> Ingest:
    return lambda source: run_stage(
        "ingest", run, config=configure(source), run_dir=str(tmp_path / "runs/one"), settings=settings
    )


def test_complete_journey(ingest: Ingest, slice_dir: Path) -> None:
    result = ingest(CompleteJourneySource(data_dir=slice_dir))
    files = sorted(Path(result.outputs["events"]).rglob("*.parquet"))
    assert all(pq.read_schema(path).equals(EVENTS) for path in files)
    assert len({path.parent for path in files}) == len(files)
    for path in files:
        day = pq.ParquetFile(path).read()
        stamps = day["ts"].to_pylist()
        assert stamps == sorted(stamps)
        assert path.parent.name == f"date={stamps[0]:%Y-%m-%d}" == f"date={stamps[-1]:%Y-%m-%d}"
    events = ds.dataset(result.outputs["events"], partitioning="hive").to_table()
    items = pq.read_table(result.outputs["items"])
    assert items.schema.equals(ITEMS)
    assert items["item_id"].to_pylist() == sorted(items["item_id"].to_pylist())
    assert pq.read_table(result.outputs["rejected"]).num_rows == 0
    users = len(set(events["user_id"].to_pylist()))
    assert result.counts == {"events": events.num_rows, "users": users, "items": items.num_rows, "rejected": 0}
    assert events.num_rows > 400


def test_rejected_rows_keep_their_reason(ingest: Ingest, tmp_path: Path) -> None:
    events = "e1,u1,1,view,web,2024-05-06\ne2,u1,1,view,web,06.05.2024\ne3,,1,view,web,2024-05-06\n"
    items = "item_id,title,price\n1,Sock,cheap\n2,Shoe,59.90\n"
    result = ingest(write_csv(tmp_path, "event_id,user_id,item_id,behavior,scenario,ts\n" + events, items))
    rejected = pq.read_table(result.outputs["rejected"])
    assert rejected.schema.equals(QUARANTINE)
    rows = {(row["table"], row["row_key"]): row for row in rejected.to_pylist()}
    assert {key: (row["reason"], row["message"]) for key, row in rows.items()} == {
        ("events", "e2"): ("unreadable_ts", "ts cannot be read from ts = '06.05.2024'"),
        ("events", "e3"): ("missing_user_id", "user_id is missing"),
        ("items", "1"): ("unreadable_price", "price cannot be read from price = 'cheap'"),
    }
    assert json.loads(rows["events", "e3"]["row"])["event_id"] == "e3"
    assert result.counts == {"events": 1, "users": 1, "items": 1, "rejected": 3}


def read_all(result: StageResult) -> tuple[dict[str, list[dict[str, object]]], list[tuple[object, ...]]]:
    """Rows of each file of the events, and the rejected rows."""
    folder = Path(result.outputs["events"])
    days = {str(path.relative_to(folder)): pq.ParquetFile(path).read() for path in folder.rglob("*.parquet")}
    rejected = pq.read_table(result.outputs["rejected"]).to_pylist()
    return {name: day.to_pylist() for name, day in days.items()}, sorted(tuple(row.values()) for row in rejected)


def test_a_log_in_parts_is_the_log_at_once(
    configure: Callable[..., RunConfig], settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(0)
    rows = [
        f"u{random.integers(3)},{random.integers(4)},view,web,2024-05-{random.integers(1, 29):02} 12:00,phone"
        for _ in range(2_000)
    ]
    faults = [",1,view,web,2024-05-06,", "u1,,view,web,2024-05-07,", "u1,1,view,web,never,", "u2,1,view,web,,"]
    written = write_csv(tmp_path, "user_id,item_id,behavior,scenario,ts,device\n" + "\n".join([*rows, *faults, ""]))
    config = configure(written.model_copy(update={"attributes": ["device"]}))
    small = settings.model_copy(update={"engine_memory": "64MB"})

    def ingest(name: str) -> StageResult:
        return run_stage(
            "ingest", run, config=config, run_dir=str(tmp_path / "runs" / name), settings=small, force=True
        )

    whole = read_all(ingest("whole"))
    assert (len(whole[0]), len(whole[1])) == (28, len(faults))
    assert any(row["event_id"].endswith("-1") for rows in whole[0].values() for row in rows)  # events that repeat
    numbers: list[int] = []

    def split(*arguments: Any) -> Sequence[Reading]:
        parts = split_by_time(*arguments)
        numbers.append(len(parts))
        return parts

    monkeypatch.setattr("components.stages.ingest.split_by_time", split)
    monkeypatch.setattr("components.ingestion.parts.BYTES_PER_ROW", 200_000)  # 64 MB are for 320 rows then
    assert read_all(ingest("parts")) == whole
    assert numbers == [7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("", "expected at least one readable row, got none, and 0 unreadable"),
        ("u1,1,view,web,never\n", "expected at least one readable row, got none, and 1 unreadable"),
    ],
)
def test_an_empty_log(rows: str, message: str, ingest: Ingest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        ingest(write_csv(tmp_path, "user_id,item_id,behavior,scenario,ts\n" + rows))


def test_unreadable_files(ingest: Ingest, tmp_path: Path) -> None:
    (tmp_path / "events.parquet").write_bytes(b"PAR1 no parquet")
    pq.write_table(pa.table({"item_id": [1], "title": ["Sock"]}), tmp_path / "items.parquet")
    source = TableSource(events=str(tmp_path / "events.parquet"), items=str(tmp_path / "items.parquet"))
    with pytest.raises(DataError, match=r"expected readable Parquet or CSV files, got .*events\.parquet"):
        ingest(source)


def test_a_broken_line_far_down(ingest: Ingest, tmp_path: Path) -> None:
    good = "u1,1,view,web,2024-05-06\n" * 30_000
    with pytest.raises(DataError, match=r"events\.csv, line 30002: 8 fields where the header has 5"):
        ingest(write_csv(tmp_path, "user_id,item_id,behavior,scenario,ts\n" + good + "u1,1,view,web,x,y,z,w\n"))
