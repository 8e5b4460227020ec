import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import mlflow
import pandas as pd
import pyarrow.parquet as pq
import pytest

from components.exceptions import GateError, MissingInputError, UnavailableError
from components.release.bundle import TITLES, read_smoke, read_tasks, verify
from components.release.registry import CANDIDATE, open_registry
from components.settings import get_settings
from components.stages.release import run
from components.storage import load_result, run_stage
from components.storage.workspace import Workspace
from tests.worlds import DEVICE, make_settings, run_python
from tests.worlds.recall import *  # noqa: F403  # fixtures
from tests.worlds.recall import Release
from tests.worlds.tiny import ITEM_IDS, NUM_ITEMS, make_run


def test_bundle_is_complete_and_verified(releases: tuple[Release, Release]) -> None:
    release = releases[0]
    manifest = verify(release.bundle)
    assert manifest.release == release.name
    top = {path.name for path in release.bundle.iterdir()}
    tables = {"titles.parquet", "fallback.parquet"}
    assert top == tables | {"model", "item_table", "index.faiss", "tasks.json", "smoke.json", "manifest.json"}
    assert not [path for path in release.bundle.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin")]
    assert {path.stat().st_mode & 0o777 for path in release.bundle.rglob("*") if path.is_file()} == {0o644}
    assert read_tasks(release.bundle) == release.config.tasks
    titles = pq.read_table(release.bundle / "titles.parquet")
    assert titles.column_names == TITLES.names
    assert titles.num_rows == NUM_ITEMS
    smoke = read_smoke(release.bundle)
    assert {request.context["user_id"] for request in smoke} == {"0", "5", "11"}  # three, spread over all
    assert {request.task for request in smoke} == {"next_purchase", "new_item", "text_query"}
    assert all(len(request.item_ids) == 10 for request in smoke)


def test_large_files_are_linked_not_copied(releases: tuple[Release, Release]) -> None:
    source = releases[0].run_dir / "sft" / "model" / "urm.safetensors"
    assert os.path.samefile(source, releases[0].bundle / "model" / "urm.safetensors")


def test_same_work_again_gives_the_same_release_and_version(releases: tuple[Release, Release]) -> None:
    release = releases[1]
    again = run_stage("release", run, config=release.config, run_dir=str(release.run_dir), settings=release.settings)
    assert again.metrics["release"] == release.name
    assert again.metrics["version"] == release.result.metrics["version"]
    assert again.outputs["bundle"] != str(release.bundle)  # which may be at work
    verify(release.bundle)


def test_the_registry_keeps_its_address_until_the_bundle_of_an_equal_release_is_in_place(
    releases: tuple[Release, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    release, registry = releases[1], open_registry(releases[1].settings)
    again = partial(
        run_stage, "release", run, config=release.config, run_dir=str(release.run_dir), settings=release.settings
    )
    version = str(release.result.metrics["version"])
    before = registry.get_model_version("urm", version).tags

    def fill_the_disk(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UnavailableError, match="got a full disk"):
        patch.setattr(Workspace, "publish", fill_the_disk)
        again()
    assert registry.get_model_version("urm", version).tags == before
    assert again().outputs["bundle"] == registry.get_model_version("urm", version).tags["urm.bundle"]


@contextmanager
def moved(folder: Path, away: Path) -> Iterator[None]:
    """Have a folder elsewhere meanwhile."""
    folder.rename(away)
    try:
        yield
    finally:
        away.rename(folder)


@pytest.fixture
def environment(releases: tuple[Release, Release], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Of a process that loads models from MLflow."""
    monkeypatch.setenv("URM_HOME", str(releases[0].settings.home))
    monkeypatch.setenv("URM_DEVICE", DEVICE)
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.mark.usefixtures("environment")
def test_a_version_leads_back_and_predicts(releases: tuple[Release, Release]) -> None:
    release = releases[1]
    registry = open_registry(release.settings)
    version = registry.get_model_version_by_alias("urm", CANDIDATE)
    assert version.version == int(release.result.metrics["version"])
    assert version.tags["urm.release"] == release.name
    newest = load_result(str(release.run_dir), "release")
    assert newest is not None
    assert version.tags["urm.bundle"] == newest.outputs["bundle"]
    assert version.tags["urm.feature_store"] == verify(Path(newest.outputs["bundle"])).feature_store
    assert version.tags["urm.gate"] == "passed"
    assert version.tags["urm.run_dir"] == str(release.run_dir)

    model = mlflow.pyfunc.load_model(f"models:/urm@{CANDIDATE}")
    assert model.metadata.metadata["release"] == release.name
    rows = pd.DataFrame({"history_item_ids": [[1003, 1004], [1010]], "task": ["new_item", "next_purchase"]})
    answer = model.predict(rows, params={"k": 5})
    assert [len(items) for items in answer["item_ids"]] == [5, 5]
    assert not {1003, 1004} & set(answer["item_ids"][0])
    assert set(answer["item_ids"][1]) <= set(ITEM_IDS.tolist())


LOAD_ELSEWHERE = """
import sys
sys.meta_path = [each for each in sys.meta_path if "editable" not in repr(each)]
import mlflow
model = mlflow.pyfunc.load_model(sys.argv[1])
import components
print(components.__file__)
"""


@pytest.mark.usefixtures("environment")
def test_a_version_brings_the_package_along(releases: tuple[Release, Release], tmp_path: Path) -> None:
    local = mlflow.artifacts.download_artifacts(f"models:/urm@{CANDIDATE}", dst_path=str(tmp_path))
    needed = (Path(local) / "requirements.txt").read_text()
    assert "torch" in needed and "urm" not in needed
    process = run_python("-c", LOAD_ELSEWHERE, local, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(local)


@pytest.mark.usefixtures("environment")
def test_a_version_loads_from_where_its_release_was_registered_last(
    releases: tuple[Release, Release], tmp_path: Path
) -> None:
    release = releases[1]
    again = run_stage("release", run, config=release.config, run_dir=str(release.run_dir), settings=release.settings)
    load = partial(mlflow.pyfunc.load_model, f"models:/urm@{CANDIDATE}")
    with moved(release.bundle, tmp_path / "first"):
        assert load().metadata.metadata["release"] == release.name
        with moved(Path(again.outputs["bundle"]), tmp_path / "last"):
            with pytest.raises(MissingInputError, match=r"input .*: expected a file or folder, got nothing"):
                load()


def test_failed_gate_stops_the_release_unless_told_otherwise(tmp_path: Path) -> None:
    airflow = {"airflow_dag_id": "recall_training", "airflow_run_id": "manual__1", "airflow_url": "http://a"}
    settings = make_settings(tmp_path).model_copy(update=airflow)
    run_dir = tmp_path / "runs" / "failed"
    config = make_run(run_dir, settings, gate_passed=False)
    with pytest.raises(GateError, match=r"expected a passed gate, got a failed one: lift below zero; .*promote-anyway"):
        run_stage("release", run, config=config, run_dir=str(run_dir), settings=settings)
    assert not (run_dir / "release" / "result.json").exists()

    options = {"promote_anyway": True}
    result = run_stage("release", run, config=config, run_dir=str(run_dir), settings=settings, options=options)
    assert result.metrics["promoted_anyway"] is True
    manifest = json.loads((Path(result.outputs["bundle"]) / "manifest.json").read_text())
    assert manifest["gate"] == {"passed": False, "promoted_anyway": True, "verdict": "Measured."}
    assert manifest["links"]["airflow_run"] == "http://a/dags/recall_training/runs/manual__1"
    tags = open_registry(settings).get_model_version_by_alias("urm", CANDIDATE).tags
    assert tags["urm.gate"] == "failed, promoted anyway"
    assert tags["urm.airflow_run_id"] == "manual__1"
