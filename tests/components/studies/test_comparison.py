"""Runs of several seeds and data sets in one table."""

from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest

from components.exceptions import DataError, MissingInputError
from components.schemas.hits import HITS
from components.settings import Settings
from components.studies.comparison import as_frame, compare_runs, read_run, summarise_runs
from tests.worlds.tables import put, write

QUALITY = {"target_attention": 0.4, "sasrec": 0.5, "urm": 0.6}
TASKS = ("next_item", "tail_item")

MakeRun = Callable[..., str]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(config: str, seed: int, models: tuple[str, ...] = tuple(QUALITY)) -> str:
        random, folder = np.random.default_rng(seed), tmp_path / f"{config}-{seed}-{len(models)}"
        rows = [
            {"example_id": 2 * user + place, "user_id": f"u{user}", "task": task, "model": model, "k": k,
             "hits": int(random.random() < QUALITY[model]), "targets": 1}
            for user in range(60) for place, task in enumerate(TASKS) for model in models for k in (10, 100)
        ]  # fmt: skip
        frame = pd.DataFrame(rows)
        means = frame[frame["k"] == 100].groupby(["task", "model"])["hits"].mean()
        tasks = {task: {"recall": means[task].to_dict(), "examples": 60} for task in TASKS}
        metrics = {"k": 100, "seed": seed, "tasks": tasks, "mean_recall": means.groupby("model").mean().to_dict()}
        hits = {"hits": write(folder / "hits.parquet", HITS, rows)}
        put(folder, "evaluate", hits, config=config, fingerprint=folder.name, metrics=metrics)
        return str(folder)

    return make


def test_means_deviations_and_pooled_lifts(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [read_run(make_run("beauty", seed)) for seed in (0, 1, 2)]
    summary = summarise_runs(runs, cache=tmp_path, draws=300)[0]
    assert (summary.config, summary.seeds, summary.k) == ("beauty", (0, 1, 2), 100)
    assert summary.models == ("sasrec", "target_attention", "urm")
    frame = as_frame([summary], 0.95).set_index(["task", "model"])
    values = [run.metrics["tasks"]["next_item"]["recall"]["urm"] for run in runs]
    row = frame.loc["next_item", "urm"]
    assert (row["mean"], row["std"]) == (pytest.approx(np.mean(values)), pytest.approx(np.std(values, ddof=1)))
    pooled = [np.mean([run.metrics["tasks"]["next_item"]["recall"][model] for run in runs]) for model in QUALITY]
    assert row["lift"] == pytest.approx(pooled[2] / pooled[0] - 1)
    assert row["low"] < row["lift"] < row["high"]
    assert summary.baseline.examples.tolist() == [180, 180]
    assert summary.best.names == ("urm", "sasrec")


def test_three_seeds_narrow_the_interval_of_one(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [read_run(make_run("beauty", seed)) for seed in (0, 1, 2)]
    widths = []
    for part in (runs[:1], runs):
        low, high = summarise_runs(part, cache=tmp_path, draws=300)[0].baseline.mean_interval(0.95)
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_table_and_mlflow(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run("beauty", 0), make_run("beauty", 1), make_run("toys", 0)]
    text = compare_runs(folders, settings=Settings(home=tmp_path / "home"), draws=200, confidence=0.95)
    assert "## beauty: Recall@100, seeds 0, 1" in text
    assert "## toys: Recall@100, seeds 0" in text
    assert text.count("| next_item |") == 2
    assert "| mean | 240 |" in text and "| mean | 120 |" in text
    assert text.count("±") == 3 * (len(TASKS) + 1)  # a single seed has no deviation
    assert text.count("Best of the other models in the mean is SASRec.") == 2
    found = mlflow.search_runs(experiment_names=["comparison"], output_format="list")
    table = mlflow.load_table("comparison.json", run_ids=[found[0].info.run_id])
    assert len(table) == 2 * (len(TASKS) + 1) * len(QUALITY)


def test_models_that_a_run_lacks_are_left_out_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run("beauty", 0), make_run("beauty", 1, ("target_attention", "urm"))]
    summary = summarise_runs([read_run(folder) for folder in folders], cache=tmp_path, draws=100)[0]
    assert (summary.models, summary.left_out) == (("target_attention", "urm"), ("sasrec",))
    assert set(summary.recalls["model"]) == {"target_attention", "urm"}
    assert summary.best.names == ("urm", "target_attention")
    text = compare_runs(folders, settings=Settings(home=tmp_path / "home"), draws=100, confidence=0.95)
    assert "Not every run has SASRec, left out here." in text


def test_runs_that_cannot_be_pooled_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    once = read_run(make_run("beauty", 0))
    with pytest.raises(DataError, match=r"expected another seed, .* got seed 0"):
        summarise_runs([once, once], cache=tmp_path, draws=100)
    other = read_run(make_run("beauty", 1))
    del other.metrics["tasks"]["tail_item"]
    with pytest.raises(DataError, match=r"tasks of .*, got others"):
        summarise_runs([once, other], cache=tmp_path, draws=100)
    with pytest.raises(MissingInputError, match="a result of stage 'evaluate'"):
        read_run(str(tmp_path / "nowhere"))
