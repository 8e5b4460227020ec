"""What is kept of a run compares as the run itself."""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.keep import keep
from components.exceptions import MissingInputError
from components.schemas.hits import HITS
from components.storage import load_result
from components.studies.comparison import read_run, summarise_runs
from tests.worlds import CONFIGS
from tests.worlds.tables import put, write

KIND = {"search": False, "exclude_bought": True}
QUALITY = {"target_attention": 0.4, "sasrec": 0.3, "item_knn": 0.5, "urm": 0.6}


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    random = np.random.default_rng(0)
    rows = [
        {"example_id": example, "user_id": f"u{example % 40}", "task": task, "model": model, "k": k,
         "hits": int(random.random() < QUALITY[model]), "targets": 1, "ndcg": random.random(), "held_out_query": None}
        for example, task in enumerate(["next_item", "tail_item"] * 60) for model in QUALITY for k in (10, 100, 500)
    ]  # fmt: skip
    folder = tmp_path / "run" / "evaluate"
    means = pd.DataFrame(rows).query("k == 100").groupby(["task", "model"])["hits"].mean()
    metrics = {
        "k": 100,
        "seed": 3,
        "tasks": {
            task: {"recall": means[task].to_dict(), "examples": 60, "held_out_categories": 0} | KIND
            for task in ("next_item", "tail_item")
        },
        "mean_recall": means.groupby("model").mean().to_dict(),
    }
    outputs = {"hits": write(folder / "hits.parquet", HITS, rows), "report": folder / "report.md"}
    put(tmp_path / "run", "evaluate", outputs, config="beauty", metrics=metrics)
    return str(tmp_path / "run")


def test_a_kept_evaluation_gives_the_same_comparison(run_dir: str, tmp_path: Path) -> None:
    size = keep(run_dir, tmp_path / "kept", tmp_path / "cache")
    moved = (tmp_path / "kept").rename(tmp_path / "moved")
    whole, kept = (
        summarise_runs([read_run(str(folder), CONFIGS)], cache=tmp_path, draws=200)[0] for folder in (run_dir, moved)
    )
    assert kept.recalls.equals(whole.recalls)
    assert kept.best is not None and whole.best is not None
    for one, other in ((kept.baseline, whole.baseline), (kept.best, whole.best)):
        lifts = [dict(zip(side.tasks, side.lift, strict=True)) for side in (one, other)]
        assert lifts[0] == lifts[1] and one.names == other.names
    assert _found(moved) == _found(Path(run_dir))
    assert size == sum(path.stat().st_size for path in (moved / "evaluate").iterdir())
    assert load_result(str(moved), "sft") is None


def _found(run_dir: Path) -> Counter[tuple[object, ...]]:
    """What the models found of each example, whatever its number."""
    hits = pd.read_parquet(run_dir / "evaluate" / "hits.parquet").query("k != 500")
    hits.loc[hits["k"] == 100, "ndcg"] = 0  # kept of short lists only
    found = hits.pivot(index=["user_id", "task", "example_id"], columns=["model", "k"], values=["hits", "ndcg"])
    return Counter(found.sort_index(axis=1).reset_index(["user_id", "task"]).itertuples(index=False, name=None))


def test_every_model_is_kept_at_the_cut_offs_that_are_published(run_dir: str, tmp_path: Path) -> None:
    keep(run_dir, tmp_path / "kept", tmp_path / "cache")
    hits = pd.read_parquet(tmp_path / "kept" / "evaluate" / "hits.parquet")
    assert set(hits["model"]) == set(QUALITY)
    assert set(hits["k"]) == {10, 100} and len(hits) == 2 * len(QUALITY) * 120
    assert str(tmp_path) not in (tmp_path / "kept" / "evaluate" / "result.json").read_text()


@pytest.fixture
def variant_run(tmp_path: Path) -> Path:
    recalls = [
        {"example_id": number, "user_id": f"u{number % 7}", "task": task, "recall": number % 3 / 2}
        for number, task in enumerate(["next_item", "tail_item"] * 20)
    ]
    run = tmp_path / "run"
    run.mkdir()
    pd.DataFrame(recalls).to_parquet(run / "recalls.parquet")
    put(run, "measure", {"recalls": run / "recalls.parquet"})
    put(run, "sft", {"model": run / "model"})
    return run


def test_a_kept_variant_of_a_study_has_its_recalls_and_its_training_time(variant_run: Path, tmp_path: Path) -> None:
    keep(str(variant_run), tmp_path / "kept", tmp_path / "cache")
    moved = (tmp_path / "kept").rename(tmp_path / "moved")
    measurement, training = (load_result(str(moved), stage) for stage in ("measure", "sft"))
    assert measurement is not None and training is not None
    kept = pd.read_parquet(measurement.outputs["recalls"]).sort_values("example_id", ignore_index=True)
    assert kept.equals(pd.read_parquet(variant_run / "recalls.parquet"))
    assert (training.outputs, training.seconds) == ({}, 1)
    assert str(tmp_path) not in "".join(path.read_text() for path in moved.rglob("result.json"))


def test_a_run_that_found_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="run `urm evaluate` or `urm ablation measure` on it"):
        keep(str(tmp_path), tmp_path / "kept", tmp_path)
