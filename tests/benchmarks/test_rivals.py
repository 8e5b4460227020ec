"""Rivals beside a kept URM are measured as in one evaluation of all."""

import shutil
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from benchmarks.keep import keep
from benchmarks.rivals import join
from components.config import RunConfig
from components.exceptions import DataError
from components.stages import evaluate
from components.storage import require_result, run_stage
from components.studies.finished import FinishedRun
from tests.worlds import make_settings
from tests.worlds.finished import finished
from tests.worlds.tables import put

__all__ = ["finished"]  # a fixture


@pytest.fixture
def run(finished: tuple[Path, RunConfig], tmp_path: Path) -> FinishedRun:
    """Evaluated, and its URM kept in `kept`."""
    settings = make_settings(tmp_path / "home")
    folder = shutil.copytree(finished[0], tmp_path / "run")
    run_stage("evaluate", evaluate.run, config=finished[1], run_dir=str(folder), settings=settings)
    keep(str(folder), tmp_path / "kept", tmp_path / "cache")
    return FinishedRun(str(folder), settings)


def test_joined_with_its_own_urm_a_run_has_its_own_metrics(
    run: FinishedRun, finished: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    join(run, finished[1], str(tmp_path / "kept"), tmp_path / "joined")
    whole, joined = (require_result(str(folder), "evaluate").metrics for folder in (run.run_dir, tmp_path / "joined"))
    assert joined["mean_recall"] == pytest.approx(whole["mean_recall"])
    assert joined["best_other"]["model"] == whole["best_other"]["model"]
    for task, result in whole["tasks"].items():
        found = joined["tasks"][task]
        assert found["recall"] == pytest.approx(result["recall"])
        assert (found["lift"], found["examples"]) == (pytest.approx(result["lift"]), result["examples"])
        # Examples in another order meet other draws.
        assert found["low"] == pytest.approx(result["low"], abs=0.1) and found["low"] < found["lift"] < found["high"]
    assert require_result(str(tmp_path / "joined"), "baseline").outputs == {}
    assert str(tmp_path) not in (tmp_path / "joined/evaluate/result.json").read_text()


def test_a_record_of_another_seed_is_refused(
    run: FinishedRun, finished: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    config = finished[1].model_copy(update={"seed": 5})
    with pytest.raises(DataError, match=r"expected URM with seed 5 .*, got seed 0"):
        join(run, config, str(tmp_path / "kept"), tmp_path / "joined")


@pytest.mark.parametrize("change", ["fewer", "other targets"])
def test_a_record_of_other_examples_is_refused(
    change: str, run: FinishedRun, finished: tuple[Path, RunConfig], tmp_path: Path
) -> None:
    examples = pq.read_table(run.path("features", "examples"))
    if change == "fewer":
        examples = examples.filter(pc.field("task") != "new_item")
        lists = pq.read_table(run.path("baseline", "predictions"))
        own = pc.is_in(lists.column("example_id"), value_set=examples.column("example_id"))
        pq.write_table(lists.filter(own), tmp_path / "predictions.parquet")
        put(Path(run.run_dir), "baseline", {"predictions": tmp_path / "predictions.parquet"})
    else:
        place = examples.column_names.index("target_item_ids")
        cut = pc.list_slice(examples.column("target_item_ids"), 0, 1)
        examples = examples.set_column(place, examples.schema.field(place), cut.cast(examples.schema.field(place).type))
    pq.write_table(examples, tmp_path / "examples.parquet")
    tables = {name: run.path("features", name) for name in ("catalogue", "contexts")}
    put(Path(run.run_dir), "features", tables | {"examples": tmp_path / "examples.parquet"})
    with pytest.raises(DataError, match="name the record of the same configuration"):
        join(run, finished[1], str(tmp_path / "kept"), tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
