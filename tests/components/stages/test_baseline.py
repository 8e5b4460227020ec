"""The whole stage: its files, and that test targets can not reach it."""

import json
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from mlflow.exceptions import MlflowException
from safetensors.numpy import load_file

from components.items.calibration import ID_WEIGHTS
from components.schemas.predictions import POPULARITY, PREDICTIONS
from components.stages.baseline import run
from components.storage import StageResult, run_stage
from tests.worlds import make_settings
from tests.worlds.baseline import *  # noqa: F403  # fixtures
from tests.worlds.tables import put
from tests.worlds.tracking import forbid_waiting

EXTRA = ["bm25f", "category_rule", "text", "id_vectors", "mix", "sasrec", "target_attention_text"]
MODELS = ["popularity", "own_history", "item_knn", "target_attention", *EXTRA]


def run_baseline(world, run_dir: Path) -> StageResult:
    tables = ["contexts.parquet", "examples.parquet", "catalogue.parquet"]
    inputs = {"validate": ["items.parquet", "events"], "features": tables, "encode": ["item_table", "item_table_past"]}
    for stage, names in inputs.items():
        put(run_dir, stage, {Path(name).stem: world.folder / name for name in names})
    settings = make_settings(run_dir / "home")
    return run_stage("baseline", run, config=world.config, run_dir=str(run_dir), settings=settings)


@pytest.fixture(scope="module")
def result(world, tmp_path_factory: pytest.TempPathFactory) -> StageResult:
    """Of a stage during which MLflow is away: it must not wait for it, and a first table is lost."""
    log_table, refused = mlflow.log_table, []

    def lose_first(data: dict[str, list[object]], name: str) -> None:
        if not refused:
            refused.append(name)
            raise MlflowException("status 503")
        log_table(data, name)

    with pytest.MonkeyPatch.context() as monkeypatch:
        forbid_waiting(monkeypatch)
        monkeypatch.setattr(mlflow, "log_table", lose_first)
        return run_baseline(world, tmp_path_factory.mktemp("run"))


def test_predictions_rank_every_test_example_by_every_model(result: StageResult, world) -> None:
    predictions = pq.read_table(result.outputs["predictions"])
    assert predictions.schema == PREDICTIONS
    examples = pq.read_table(world.folder / "examples.parquet", filters=pc.field("split") == "test")
    wanted = sorted(examples.column("example_id").to_pylist())
    for model in MODELS:
        mine = predictions.filter(pc.field("model") == model)
        assert mine.column("example_id").to_pylist() == wanted
        for items, scores in zip(mine.column("item_ids").to_pylist(), mine.column("scores").to_pylist(), strict=True):
            assert len(set(items)) == len(items) == len(scores)
            assert np.all(np.diff(scores) <= 0)


def test_no_model_recommends_bought_items_where_the_task_excludes_them(result: StageResult, world) -> None:
    examples = {row["example_id"]: row for row in pq.read_table(world.folder / "examples.parquet").to_pylist()}
    contexts = {row["context_id"]: row for row in pq.read_table(world.folder / "contexts.parquet").to_pylist()}
    checked = 0
    for row in pq.read_table(result.outputs["predictions"]).to_pylist():
        example = examples[row["example_id"]]
        if example["task"] == "new_item":
            assert not set(row["item_ids"]) & set(contexts[example["context_id"]]["history_item_ids"])
            checked += 1
    assert checked > len(MODELS)


def test_trained_models_leave_weights_and_say_how_they_were_trained(result: StageResult) -> None:
    for output in ("model", "target_attention_text", "sasrec"):
        folder = Path(result.outputs[output])
        assert load_file(folder / "network.safetensors")
        assert json.loads((folder / "network.json").read_text())
    assert set(result.metrics["validation_recall"]) == set(MODELS)
    training = result.metrics["training"]
    assert set(training) == {"target_attention", "target_attention_text", "sasrec"}
    assert all(summary["best_recall"]["mean"] > 0 for summary in training.values())
    for name in ("target_attention", "target_attention_text"):  # rules choose their weight of popularity in a grid
        calibrated, best = (training[name][recall] for recall in ("calibrated_recall", "best_recall"))
        assert calibrated.keys() <= best.keys()
        assert all(calibrated[task] >= best[task] - 1e-6 for task in calibrated)


def test_popularity_table_holds_every_task(result: StageResult, world) -> None:
    popularity = pq.read_table(result.outputs["popularity"])
    assert popularity.schema == POPULARITY
    assert set(popularity.column("task").to_pylist()) == {task.name for task in world.config.tasks}


def test_mlflow_holds_curves_trials_and_data_sets(result: StageResult, world) -> None:
    runs = mlflow.search_runs(
        experiment_names=[world.config.name], filter_string="tags.`urm.stage` = 'baseline'", output_format="list"
    )
    assert len(runs) == 1
    found = runs[0]
    for prefix in ("", "target_attention_text."):
        assert {found.data.metrics[f"{prefix}id_weight.{task.name}"] for task in world.config.tasks} <= set(ID_WEIGHTS)
    assert found.data.params["learning_rate"] == str(world.config.baseline.learning_rate)
    chosen = {"item_knn.shrinkage", "own_history.half_life_days", "bm25f.query.category", "mix.history.decay"}
    assert chosen <= found.data.params.keys()
    splits = {entry.dataset.name.rsplit(".", 1)[1] for entry in found.inputs.dataset_inputs}
    assert splits == {"train", "validation", "test"}
    curve = mlflow.MlflowClient().get_metric_history(found.info.run_id, "validation_recall.mean")
    assert len(curve) > 1
    assert found.data.metrics["examples_per_second"] > 0


def test_test_targets_change_nothing(result: StageResult, with_table: Callable, tmp_path: Path) -> None:
    def hide_answers(table: pa.Table) -> pa.Table:
        first = table.column("target_item_ids")[0].as_py()[:1]
        rows = table.to_pylist()
        for row in rows:
            if row["split"] == "test":
                row["target_item_ids"] = first
        return pa.Table.from_pylist(rows, schema=table.schema)

    blind = run_baseline(with_table("examples", hide_answers), tmp_path / "blind")
    assert pq.read_table(blind.outputs["predictions"]).equals(pq.read_table(result.outputs["predictions"]))
