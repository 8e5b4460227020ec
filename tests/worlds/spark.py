"""Spark in tests: its Java process, a small log with ties of all kinds, and both stages on an engine."""

import gc
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.schemas.events import EVENTS, ITEMS, QUARANTINE
from components.settings import Settings
from components.stages import features, validate
from components.storage import StageResult, run_stage
from tests.worlds import make_settings
from tests.worlds.logs import START, WEEK, make_config, task
from tests.worlds.tables import event_row, item_row, put, write, write_days

needs_java = pytest.mark.skipif(
    shutil.which("java") is None and "JAVA_HOME" not in os.environ,
    reason="Spark needs a Java runtime, and none is here",
)
MARKS = [
    needs_java,
    pytest.mark.timeout(1800),  # on a machine that does other work
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),  # of pyspark 4.0
]
MEMORY = "600MB"
# What Spark's configuration file says beside the settings: less optimisation, since each query here runs once.
DEFAULTS = """
spark.driver.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=160m -XX:+UseSerialGC
spark.sql.codegen.wholeStage false
spark.sql.adaptive.enabled false
spark.driver.host 127.0.0.1
spark.ui.enabled false
spark.sql.shuffle.partitions 2
spark.executor.extraJavaOptions -XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=160m -XX:+UseSerialGC
"""
INTERPRETED = "spark.sql.codegen.factoryMode NO_CODEGEN\n"  # compiling them took a third of the time
USERS = ("a", "b", "Ünal", "v", "user f", "", *map(str, range(9)))
CATEGORIES = (
    [],
    ["Food"],
    ["Food", "ΕΡΥΘΡΟΣ_ΟΙΝΟΣ"],
    ["Food", "İÇECEK\x0bsu\u00a0ev"],
    *(["Food", f"VEG/fruit_f{n} ", f"Coffee-v:É\t{n}f"] for n in range(9)),
)
NUM_ITEMS, NUM_EVENTS = 20, 260
TITLES = ("", "Vegan Fluff, off", "L'Oréal  crème-de-la 5 ab abc", "café VIVE v f", "ΟΙΝΟΣ İÇECEK 口红 ผ้าขน")
# Between them, all that a filter can ask.
TASKS = [
    task(behaviors=["purchase", "view"], max_train_events=40) | {"name": "usual"},
    task(history="not_bought", new_category_level=-1, query_category_level=-1) | {"name": "new"},
    task(known_brand=True, min_history_items=2, query_title_words=2) | {"name": "brand"},
    task(attributes={"shown": "true"}, scenarios=["store"], max_popularity_quantile=0.9) | {"name": "shown"},
]


@pytest.fixture(scope="module", autouse=True)
def java(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One Java process for the module, which ends with it; the module's `SPARK` is added to what Spark is told."""
    folder = tmp_path_factory.mktemp("spark")
    (folder / "spark-defaults.conf").write_text(DEFAULTS + getattr(request.module, "SPARK", ""))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARK_CONF_DIR", str(folder))
        yield
        import pyspark.sql

        gateway, pyspark.SparkContext._gateway, pyspark.SparkContext._jvm = pyspark.SparkContext._gateway, None, None
        # A session that could not be closed is left: MLflow would ask it for its registry, in all tests that follow.
        pyspark.SparkContext._active_spark_context = None
        pyspark.sql.SparkSession._instantiatedSession = pyspark.sql.SparkSession._activeSession = None
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
