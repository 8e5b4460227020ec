"""Spark computes the tables that DuckDB computes: equal rows, in equal order, lists too."""

from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pytest

from components.engines.engine import memory_limit, open_engine, read_folder, read_numbered
from components.exceptions import ConfigError, UnavailableError
from components.features import log as log_module
from components.stages import encode, ingest
from components.storage import run_stage
from tests.worlds import spark as world
from tests.worlds.logs import START, WEEK, make_config
from tests.worlds.spark import run_stages, with_engine, write_log
from tests.worlds.tables import event_row, put, write, write_days

pyspark = pytest.importorskip("pyspark", reason="the extra `spark` is not installed; `make` adds it where Java is")
pytestmark = world.MARKS
java = world.java
SPARK = world.INTERPRETED  # on a cluster expressions are compiled (test_spark_cluster.py)


def test_both_engines_make_equal_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "memory_limit", lambda engine: 3_000 * log_module.BYTES_PER_PAIR)  # some shards
    tables = write_log(tmp_path / "tables", seed=0)
    duckdb = run_stages(tmp_path / "duckdb", tables, "duckdb")
    spark = run_stages(tmp_path / "spark", tables, "spark")
    assert duckdb.keys() == spark.keys()
    for name, table in duckdb.items():
        assert spark[name].schema.equals(table.schema), name
        assert spark[name].to_pylist() == table.to_pylist(), name
    assert all(len(duckdb[f"features/{name}.parquet"]) > 2 for name in ("catalogue/catalogue", "examples/examples"))


def test_relative_paths_are_those_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_days(tmp_path / "events", [event_row("e", 1, START), event_row("f", 2, START + WEEK)])
    with open_engine(tmp_path / "spill", with_engine(tmp_path, "spark")) as engine:
        assert ibis.get_backend() is engine
        assert memory_limit(engine) == 572 << 20
        monkeypatch.chdir(tmp_path)
        rows = read_folder(engine, Path("events")).order_by("event_id").to_pyarrow()
    assert rows["event_id"].to_pylist() == ["e", "f"]
    assert rows.schema.field("ts").type == pa.timestamp("us", "UTC")


def test_what_an_attempt_that_was_ended_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "spill" / "tables" / "kept").mkdir(parents=True)
    (tmp_path / "spill" / "tables" / "kept" / "part.parquet").touch()
    with open_engine(tmp_path / "spill", with_engine(tmp_path, "spark")) as engine:
        assert engine.create_table("kept", pa.table({"a": [1]}), temp=True).count().execute() == 1


def test_rows_are_numbered_by_file_whatever_its_name(tmp_path: Path) -> None:
    paths = [tmp_path / name / "part=1 +é%.parquet" for name in ("b", "a")]
    for path in paths:
        write(path, pa.schema([("a", pa.int64())]), [{"a": 5}, {"a": 6}])
    with open_engine(tmp_path / "spill", with_engine(tmp_path, "spark")) as engine:
        rows = read_numbered(engine, paths).order_by("_file", "_position").to_pyarrow().to_pylist()
    assert [(row["_file"], row["_position"]) for row in rows] == [
        (str(path), position) for path in reversed(paths) for position in (0, 1)
    ]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"engine_memory": "100MB"}, ConfigError, "URM_ENGINE_MEMORY: expected at least 512MiB for spark, got 100MB"),
        ({"spark_master": "nowhere"}, UnavailableError, "Spark at nowhere: expected a session, got .*URM_SPARK_MASTER"),
    ],
)
def test_settings_that_spark_refuses_are_named(
    tmp_path: Path, changes: dict[str, str], error: type[Exception], message: str
) -> None:
    settings = with_engine(tmp_path, "spark", num_threads=0, **changes)
    with pytest.raises(error, match=message), open_engine(tmp_path / "spill", settings):
        pass


@pytest.mark.parametrize("stage", [ingest, encode])
def test_a_stage_that_needs_duckdb_says_so(tmp_path: Path, stage: Any) -> None:
    name = stage.__name__.rpartition(".")[2]
    put(tmp_path, "validate", {"events": tmp_path, "items": tmp_path}, config="small")
    with pytest.raises(ConfigError, match=f"URM_ENGINE, stage {name}: expected duckdb, .* got spark"):
        run_stage(name, stage.run, config=make_config(), run_dir=str(tmp_path), settings=with_engine(tmp_path, "spark"))
