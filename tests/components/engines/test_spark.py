"""Spark computes the tables that DuckDB computes: equal rows, in equal order, lists too."""

import gc
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st

from components.engines.engine import memory_limit, open_engine, read_folder, read_numbered
from components.exceptions import ConfigError, DataError, UnavailableError
from components.features import log as log_module
from components.schemas.events import EVENTS, ITEMS, QUARANTINE
from components.settings import Settings
from components.stages import encode, features, ingest, validate
from components.storage import StageResult, run_stage
from tests.worlds import make_settings
from tests.worlds.logs import START, WEEK, make_config, task
from tests.worlds.tables import event_row, item_row, put, write, write_days

pyspark = pytest.importorskip("pyspark", reason="the extra `spark` is not installed; `make` adds it where Java is")
needs_java = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ,
    reason="Spark needs a Java runtime, and none is here",
)
pytestmark = [
    needs_java,
    pytest.mark.timeout(1800),  # on a machine that does other work
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # of pyspark 4.0
]

MEMORY = "600MB"
# What Spark's configuration file says beside the settings: less optimisation, since each query here runs once.
DEFAULTS = """
spark.driver.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=160m
spark.sql.codegen.wholeStage false
spark.sql.adaptive.enabled false
spark.driver.host 127.0.0.1
spark.ui.enabled false
spark.sql.shuffle.partitions 2
spark.executor.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=160m
"""
USERS = ("a", "b", "Ünal", "v", "user f", "", *map(str, range(9)))
CATEGORIES = ([], ["Food"], *(["Food", f"VEG/fruit_f{n} ", f"Coffee-v:É\t{n}f"] for n in range(9)))
NUM_ITEMS, NUM_EVENTS = 20, 260
TITLES = ("", "Vegan Fluff, off", "L'Oréal  crème-de-la 5 ab abc", "café VIVE v f")
# Between them, all that a filter can ask.
TASKS = [
    task(behaviors=["purchase", "view"], max_train_events=40) | {"name": "usual"},
    task(history="not_bought", new_category_level=-1, query_category_level=-1) | {"name": "new"},
    task(known_brand=True, min_history_items=2, query_title_words=2) | {"name": "brand"},
    task(attributes={"shown": "true"}, scenarios=["store"], max_popularity_quantile=0.9) | {"name": "shown"},
]


@pytest.fixture(scope="module", autouse=True)
def java(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Java process for the module, which ends with it."""
    folder = tmp_path_factory.mktemp("spark")
    (folder / "spark-defaults.conf").write_text(DEFAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        yield
        gateway, pyspark.SparkContext._gateway, pyspark.SparkContext._jvm = pyspark.SparkContext._gateway, None, None
        if gateway is not None:
            gateway.shutdown()
            gateway.proc.stdin.close()
            gateway.proc.wait()
        del gateway
        gc.collect()


def with_engine(home: Path, engine: str, **changes: Any) -> Settings:
    values = make_settings(home).model_dump() | {"engine": engine, "engine_memory": MEMORY} | changes
    return Settings.model_validate(values)


def write_log(folder: Path, seed: int) -> dict[str, Path]:
    """A small log: instants that coincide with one another and with cuts, ties of all kinds, rows that are refused."""
    random = np.random.default_rng(seed)
    moments = [START + hours * timedelta(hours=7) for hours in range(-24, 72)] + [START, START + WEEK, START + 2 * WEEK]

    def one_of(values: Any) -> Any:
        return values[random.integers(len(values))]

    events = [
        event_row(
            one_of([f"e{number}", f"e{number // 2}", ""]) if random.random() < 0.1 else f"e{number}",
            int(random.integers(NUM_ITEMS + 1)),
            one_of(moments) + timedelta(microseconds=int(random.integers(3))),
            user_id=one_of(USERS),
            behavior=one_of(["purchase", "view", "Favorite"]),
            scenario=one_of(["store", "home"]),
            attributes=one_of([{}, {"shown": "true"}, {"shown": "false", "other": "1"}]),
        )
        for number in range(NUM_EVENTS)
    ]
    items = [
        item_row(number, title=one_of(TITLES), category=one_of(CATEGORIES), brand=one_of([None, "x", "y"]))
        for number in (*range(NUM_ITEMS), 3)
    ]
    return {
        "events": write_days(folder / "events", events, EVENTS),
        "items": write(folder / "items.parquet", ITEMS, items),
        "rejected": write(folder / "rejected.parquet", QUARANTINE, []),
    }


def read_outputs(result: StageResult) -> dict[str, pa.Table]:
    """The Parquet files of a stage, by name; a folder's with their place in it."""
    found = {}
    for name, uri in result.outputs.items():
        for path in sorted(Path(uri).rglob("*.parquet")) if Path(uri).is_dir() else [Path(uri)]:
            found[f"{name}/{path.relative_to(Path(uri).parent)}"] = pq.ParquetFile(path).read()
    return found


def run_stages(root: Path, tables: dict[str, Path], engine: str, **changes: Any) -> dict[str, pa.Table]:
    """Validate and features of a log, on an engine."""
    put(root, "ingest", tables, config="small", fingerprint=str(root))
    limits = {"history_length": 4, "max_train_contexts": 3, "max_validation_examples": 2, "max_test_examples": 2}
    config = make_config(TASKS, **limits)
    config = config.model_copy(update={"validation": config.validation.model_copy(update={"max_quarantined_share": 1})})
    outputs: dict[str, pa.Table] = {}
    for name, stage in (("validate", validate), ("features", features)):
        result = run_stage(
            name, stage.run, config=config, run_dir=str(root), settings=with_engine(root, engine, **changes)
        )
        outputs |= {f"{name}/{key}": table for key, table in read_outputs(result).items()}
    return outputs


@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],  # a smaller seed is no smaller log
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(seed=st.integers(0, 2**32 - 1))
def test_both_engines_make_equal_tables(
    seed: int, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "memory_limit", lambda engine: 3_000 * log_module.BYTES_PER_PAIR)  # some shards
    root = tmp_path_factory.mktemp("both")
    tables = write_log(root / "tables", seed)
    try:
        duckdb = run_stages(root / "duckdb", tables, "duckdb")
    except DataError:  # a task has no example
        reject()
    spark = run_stages(root / "spark", tables, "spark")
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
