"""The stage through its real contract: once as a call, once as a process that is killed and run again."""

import json
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import mlflow
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from components.config import RunConfig
from components.exceptions import ConfigError
from components.items.calibration import ID_WEIGHTS
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.examples import CATALOGUE
from components.stages.sft import run
from components.storage import run_stage
from components.urm.data.request import RecallRequest, read_contexts
from components.urm.inference import UrmRecaller
from components.urm.training import session
from tests.worlds import DEVICE, REPOSITORY, run_python, wait_until
from tests.worlds.tables import put
from tests.worlds.tracking import forbid_waiting
from tests.worlds.urm import *  # noqa: F403  # fixtures


@pytest.fixture
def run_dir(tables, tmp_path):
    """A run directory with what features, encode and baseline leave."""
    folder, files = tmp_path / "runs" / "tiny", tmp_path / "files"
    files.mkdir()
    trains = pc.equal(tables.examples["split"], "train")  # the stage trains on the recent ones and no others
    features = {
        "catalogue": tables.catalogue,
        "contexts": tables.contexts,
        "examples": tables.examples.filter(pc.invert(trains)),
        "recent_examples": tables.examples.filter(trains),
    }
    for name, table in features.items():
        pq.write_table(table, files / f"{name}.parquet")
    put(folder, "features", {name: files / f"{name}.parquet" for name in features})
    rng = np.random.default_rng(1)
    ids, num = tables.item_ids, len(tables.item_ids)
    names = ["item_table", "item_table_past"]
    everyone = np.ones(num, bool)
    for number, name in enumerate(names):
        roles = {role: (rng.normal(size=(num, 8)), ids < ids[-5 - number]) for role in ("id", "id_history")}
        others = {"text": (rng.normal(size=(num, 12)), everyone), POPULARITY: (np.ones((num, 1)), everyone)}
        write_item_table(files / name, ids, roles | others)
    put(folder, "encode", {name: files / name for name in names})
    return folder


def test_stage_leaves_what_evaluation_and_release_read(config: RunConfig, run_dir, settings, tables, monkeypatch):
    # All eight validation contexts, so that the training is measured on those that set popularity.
    config = config.model_copy(update={"urm": config.urm.model_copy(update={"validation_contexts": 8})})
    forbid_waiting(monkeypatch)
    result = run_stage("sft", run, config=config, run_dir=str(run_dir), settings=settings)

    table = ItemTable.open(result.outputs["item_table"])
    assert sorted(table.modalities) == ["id", "id_history", "popularity", "text"]
    assert table.modalities["id"].present.sum() == 55
    keys = np.load(Path(result.outputs["candidates"]) / "keys.npy")
    assert keys.tolist() == tables.catalogue["item_id"].to_pylist()
    assert tables.catalogue.schema == CATALOGUE
    recaller = UrmRecaller.load(*(result.outputs[name] for name in ("model", "item_table", "candidates")))
    context = next(iter(read_contexts(tables.contexts).values()))
    items, scores = recaller.recall([RecallRequest(context, config.tasks[0])], 10)
    assert len(items[0]) == 10
    assert np.isfinite(scores[0]).all()

    training = result.metrics["training"]
    assert training["steps"] == 6
    assert training["stopped_by"] == "steps"
    assert 0 <= result.metrics["validation_recall"] <= 1
    calibrated = result.metrics["calibrated_recall"]
    assert set(calibrated) == {task.name for task in config.tasks}
    assert np.mean(list(calibrated.values())) >= result.metrics["validation_recall"] - 1e-6
    mlflow.set_tracking_uri(settings.tracking_uri)
    runs = mlflow.search_runs(experiment_names=["complete_journey"], filter_string="tags.`urm.stage` = 'sft'")
    assert len(runs) == 1
    assert runs.iloc[0]["params.num_user_vectors"] == "3"
    for task in config.tasks:
        assert runs.iloc[0][f"metrics.calibrated_recall.{task.name}"] == calibrated[task.name]
        assert runs.iloc[0][f"metrics.id_weight.{task.name}"] in ID_WEIGHTS
    history = mlflow.MlflowClient().get_metric_history(runs.iloc[0].run_id, "validation_recall")
    assert [point.step for point in history] == [3, 6]
    inputs = mlflow.get_run(runs.iloc[0].run_id).inputs.dataset_inputs
    assert {item.dataset.name for item in inputs} == {"complete_journey.train", "complete_journey.validation"}


@pytest.mark.parametrize(("cuts", "with_vector", "num_contexts"), [("recent", 54, 6), ("all", 55, 16)])
def test_the_newest_cuts_are_judged_by_the_past_and_all_cuts_by_the_present(
    config: RunConfig, run_dir, settings, tables, monkeypatch, cuts, with_vector, num_contexts
):
    """Of the two tables only the past one lacks the vector of one more item; six of 16 contexts are of newest cuts."""
    config = config.model_copy(update={"urm": config.urm.model_copy(update={"train_cuts": cuts})})
    old = pc.less(tables.contexts["context_id"], 10)
    starts = pc.if_else(old, config.features.split.train_start - timedelta(days=7), tables.contexts["cut_ts"])
    place = tables.contexts.schema.get_field_index("cut_ts")
    field = tables.contexts.schema.field("cut_ts")
    files = run_dir.parent.parent / "files"
    pq.write_table(tables.contexts.set_column(place, field, starts.cast(field.type)), files / "contexts.parquet")
    pq.write_table(tables.examples, files / "examples.parquet")
    newest = pc.greater_equal(tables.examples["context_id"], 10)
    trains = pc.equal(tables.examples["split"], "train")
    pq.write_table(tables.examples.filter(pc.and_(newest, trains)), files / "recent_examples.parquet")
    found = {}

    def watch(name, place):
        made = getattr(session, name)

        def make(*arguments):
            found[name] = int(arguments[place].reader.table.modalities["id"].present.sum())
            return made(*arguments)

        monkeypatch.setattr(session, name, make)

    watch("TrainingSteps", 1)
    watch("Validation", 2)
    result = run_stage("sft", run, config=config, run_dir=str(run_dir), settings=settings)
    found["served"] = int(ItemTable.open(result.outputs["item_table"]).modalities["id"].present.sum())
    assert found == {"TrainingSteps": with_vector, "Validation": 55, "served": 55}
    assert result.counts["train_examples"] == len(config.tasks) * num_contexts


def test_time_limit_ends_the_training_cleanly(config: RunConfig, run_dir, settings):
    limited = config.model_copy(update={"urm": config.urm.model_copy(update={"max_steps": 10_000, "max_seconds": 2})})
    result = run_stage("sft", run, config=limited, run_dir=str(run_dir), settings=settings)
    training = result.metrics["training"]
    assert training["stopped_by"] == "time"
    assert 0 < training["steps"] < 10_000
    assert training["best_step"] <= training["steps"]
    assert (Path(result.outputs["model"]) / "urm.safetensors").is_file()


def write_config(config: RunConfig, folder: Path, **urm: int) -> Path:
    """The configuration as a file, some values of its section urm changed."""
    (folder / "configs" / "tasks").mkdir(parents=True)
    content = config.model_dump(mode="json")
    content["urm"] |= urm
    (folder / "configs" / "tiny.yaml").write_text(yaml.safe_dump(content))
    return folder / "configs" / "tiny.yaml"


@pytest.mark.parametrize("place", ["disk", "store"])
def test_an_interrupted_training_resumes_with_its_mlflow_run(
    config: RunConfig, run_dir, settings, tmp_path, monkeypatch, place
):
    """On a disk that lasts, after SIGKILL; and in an object store, after SIGTERM, with nothing left on the machine."""
    path = write_config(config, tmp_path, max_steps=30, eval_steps=10)
    common = {"URM_HOME": settings.home, "URM_DEVICE": DEVICE, "URM_NUM_THREADS": "1"}
    common |= {"URM_CHECKPOINT_MINUTES": "0.001" if place == "store" else "10"}
    uri = run_dir if place == "disk" else f"local://{run_dir}"  # a store, for all that the stage knows
    arguments = ["-m", "components", "sft", "-c", path, "-r", uri]

    def environment(attempt: str) -> dict[str, str]:
        cache = settings.cache_path if place == "disk" else tmp_path / attempt
        return os.environ | {name: str(value) for name, value in {**common, "URM_CACHE_DIR": cache}.items()}

    first = subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=REPOSITORY, env=environment("first"), stderr=subprocess.PIPE
    )
    folder = ".scratch-*" if place == "disk" else ".checkpoints-*"
    checkpoints = f"sft/{folder}/checkpoint-{'1?' if place == 'disk' else '*'}/budget.json"
    wait_until(lambda: list(run_dir.glob(checkpoints)) or first.poll() is not None, seconds=120)
    assert first.poll() is None, "the stage ended before its first checkpoint"
    first.send_signal(signal.SIGKILL if place == "disk" else signal.SIGTERM)
    _, errors = first.communicate()
    if place == "store":
        assert first.returncode == 143
        assert b"training: expected to run to its end, got SIGTERM at step" in errors
        assert b"Traceback" not in errors
    assert not (run_dir / "sft" / "result.json").exists()

    second = run_python(*arguments, env=environment("second"))
    assert second.returncode == 0, second.stderr
    assert "resuming" in second.stderr
    result = json.loads((run_dir / "sft" / "result.json").read_text())
    assert result["metrics"]["training"]["steps"] == 30
    left = {name.name for name in (run_dir / "sft").iterdir()}
    assert left <= {"result.json", "progress.json", ".lock", result["fingerprint"][:16]}

    mlflow.set_tracking_uri(settings.tracking_uri)
    runs = mlflow.search_runs(experiment_names=["complete_journey"], filter_string="tags.`urm.stage` = 'sft'")
    assert runs["status"].tolist() == ["FINISHED"]
    history = mlflow.MlflowClient().get_metric_history(runs.iloc[0].run_id, "loss")
    assert {point.step for point in history} == {10, 20, 30}
    assert len({(point.step, point.value) for point in history}) == 3


def test_two_processes_of_torchrun_leave_one_result(config: RunConfig, run_dir, settings, tmp_path):
    """On CPUs, since two processes cannot share a GPU."""
    settings = settings.model_copy(update={"device": "cpu"})
    path = write_config(config, tmp_path)
    environment = os.environ | {"URM_HOME": str(settings.home), "URM_DEVICE": "cpu", "URM_NUM_THREADS": "1"}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    stage = ("-m", "components", "sft", "-c", path, "-r", run_dir)
    done = run_python(*torchrun, *stage, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    together = json.loads((run_dir / "sft" / "result.json").read_text())
    assert not list((run_dir / "sft").glob(".scratch-*"))
    mlflow.set_tracking_uri(settings.tracking_uri)
    assert len(mlflow.search_runs(experiment_names=["complete_journey"], filter_string="tags.`urm.stage` = 'sft'")) == 1

    alone = run_stage("sft", run, config=config, run_dir=str(run_dir), settings=settings, force=True)
    assert together["metrics"]["training"]["steps"] == alone.metrics["training"]["steps"]
    vectors = [np.load(Path(outputs["candidates"]) / "vectors.npy") for outputs in (together["outputs"], alone.outputs)]
    np.testing.assert_allclose(*vectors, atol=0.05)


def test_a_helping_process_leaves_no_item_table(config: RunConfig, run_dir, settings, monkeypatch):
    left = []

    def help_out(stage):
        report = run(stage)
        left.extend(stage.output.iterdir())
        return report

    training = SimpleNamespace(train=lambda *_, **__: None)
    monkeypatch.setattr("components.stages.sft.prepare", lambda *_, **__: training)
    helper = settings.model_copy(update={"process": 1, "processes": 2})
    run_stage("sft", help_out, config=config, run_dir=str(run_dir), settings=helper)
    assert left == []


def test_a_stage_of_one_process_refuses_two(config: RunConfig, run_dir, settings):
    two = settings.model_copy(update={"processes": 2})
    with pytest.raises(ConfigError, match=r"stage features: expected one process, got 2 \(WORLD_SIZE\)"):
        run_stage("features", run, config=config, run_dir=str(run_dir), settings=two)
