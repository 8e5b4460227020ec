from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from components.exceptions import ReleaseError
from components.recall.serving.engine import load_release
from components.release.bundle import read_manifest, read_smoke
from components.release.publication import Publication
from components.stages.release import run
from components.storage import StageResult, run_stage
from components.urm.retrieval import faiss_kinds as index_kinds
from tests.worlds import make_settings
from tests.worlds.tiny import NUM_ITEMS, make_run

Build = Callable[..., StageResult]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Build a release of the tiny world with other settings of `release`."""
    settings = make_settings(tmp_path)
    run_dir = tmp_path / "runs" / "tiny"
    config = make_run(run_dir, settings)

    def build(**settings_of_release: Any) -> StageResult:
        release = config.release.model_copy(update=settings_of_release)
        changed = config.model_copy(update={"release": release})
        result = run_stage("release", run, config=changed, run_dir=str(run_dir), settings=settings)
        publication = Publication(release=result.metrics["release"], bundle=result.outputs["bundle"], order=1)
        load_release(publication, settings, changed.release.model_copy(update={"smoke_min_overlap": 0.5}))
        return result

    return build


def read_index(result: StageResult) -> faiss.Index:
    return faiss.read_index(str(Path(result.outputs["bundle"]) / "index.faiss"))


def test_small_catalogue_gets_an_exact_index(build: Build) -> None:
    result = build()
    assert (result.metrics["index"], result.metrics["index_recall"]) == ("exact", 1.0)
    note = read_manifest(Path(result.outputs["bundle"])).index
    assert (note.kind, note.items, note.recall, note.requests) == ("exact", NUM_ITEMS, 1.0, 0)
    assert isinstance(read_index(result), faiss.IndexIDMap2)


@pytest.mark.parametrize("kind", ["ivf_sq8", "pq"])
def test_named_kind_is_built_measured_and_noted(build: Build, kind: str) -> None:
    result = build(index=kind, index_min_recall=0.5)
    bundle = Path(result.outputs["bundle"])
    note = read_manifest(bundle).index
    assert (note.kind, note.items, note.k) == (kind, NUM_ITEMS, 10)
    assert note.requests == len(read_smoke(bundle)) == 9
    assert 0.5 <= note.recall <= 1
    assert (result.metrics["index"], result.metrics["index_recall"]) == (kind, note.recall)
    assert not isinstance(read_index(result), faiss.IndexIDMap2)


def test_named_kind_below_the_floor_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_cells(monkeypatch)
    match = r"index of kind 'ivf_sq8': expected at least 1 of the exact top-10 .*, got 0\.\d+ over 9 smoke requests"
    with pytest.raises(ReleaseError, match=match):
        build(index="ivf_sq8", index_min_recall=1.0)


def test_auto_falls_back_to_a_more_exact_kind(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_kinds, "EXACT_UP_TO", NUM_ITEMS - 2)
    monkeypatch.setattr(index_kinds, "IVF_SQ8_UP_TO", NUM_ITEMS - 1)
    spoil_cells(monkeypatch)
    result = build(index="auto", index_min_recall=1.0)  # pq, then ivf_sq8, then exact
    assert (result.metrics["index"], result.metrics["index_recall"]) == ("exact", 1.0)
    assert isinstance(read_index(result), faiss.IndexIDMap2)


def test_candidates_that_do_not_fit_are_refused(build: Build, tmp_path: Path) -> None:
    keys = tmp_path / "runs" / "tiny" / "sft" / "candidates" / "keys.npy"
    np.save(keys, np.load(keys)[:-1])
    with pytest.raises(ReleaseError, match=rf"one vector per key, got {NUM_ITEMS - 1} keys and vectors of shape"):
        build()


def spoil_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search one cell of several: half of the best items then lie elsewhere."""
    monkeypatch.setattr(index_kinds, "count_cells", lambda _: 8)
    for kind, shape in index_kinds.SHAPES.items():
        monkeypatch.setitem(index_kinds.SHAPES, kind, replace(shape, probes=1 / 8))
