"""A Java process that dies under a stage, in a module of its own: a module has one such process."""

from pathlib import Path

import ibis
import pytest

from components.engines.engine import open_engine, read_folder
from components.exceptions import UnavailableError
from tests.worlds import spark as world
from tests.worlds.logs import START
from tests.worlds.spark import with_engine
from tests.worlds.tables import event_row, write_days

pyspark = pytest.importorskip("pyspark", reason="the extra `spark` is not installed; `make` adds it where Java is")
pytestmark = world.MARKS
java = world.java
SPARK = world.INTERPRETED


def test_a_driver_that_dies_is_one_sentence(tmp_path: Path) -> None:
    write_days(tmp_path / "events", [event_row("e", 1, START)])
    before = ibis.options.default_backend
    with (
        pytest.raises(UnavailableError, match=r"^Spark: expected a running driver, got .*; raise URM_ENGINE_MEMORY"),
        open_engine(tmp_path / "spill", with_engine(tmp_path, "spark")) as engine,
    ):
        rows = read_folder(engine, tmp_path / "events")
        pyspark.SparkContext._gateway.proc.kill()
        pyspark.SparkContext._gateway.proc.wait()
        rows.count().execute()
    assert ibis.options.default_backend is before
