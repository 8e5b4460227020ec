"""Runs of several seeds and data sets in one table."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from components.exceptions import DataError, MissingInputError
from components.schemas.hits import HITS
from components.settings import Settings
from components.studies.comparison import as_frame, compare_runs, read_run, render, summarise_runs
from tests.worlds import CONFIGS
from tests.worlds.tables import put, write

QUALITY = {"target_attention": 0.4, "sasrec": 0.5, "urm": 0.6}
TASKS = ("next_item", "tail_item", "unseen_category_query")
OLD = ("example_id", "user_id", "task", "model", "k", "hits", "targets")  # columns of older records

MakeRun = Callable[..., str]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(config: str, seed: int, models: tuple[str, ...] = tuple(QUALITY), old: bool = False) -> str:
        random, folder = np.random.default_rng(seed), tmp_path / f"{config}-{seed}-{len(models)}-{old}"
        rows = [
            {"example_id": len(TASKS) * user + place, "user_id": f"u{user}", "task": task, "model": model, "k": k,
             "hits": int(random.random() < QUALITY[model]), "targets": 1, "ndcg": 0.5,
             "held_out_query": f"c{user % 7}" if task.endswith("query") else None}
            for user in range(60) for place, task in enumerate(TASKS) for model in models for k in (10, 100)
        ]  # fmt: skip
        frame = pd.DataFrame(rows)
        means = frame[frame["k"] == 100].groupby(["task", "model"])["hits"].mean()
        tasks = {task: {"recall": means[task].to_dict(), "examples": 60} for task in TASKS}
        for task, result in () if old else tasks.items():
            search = task.endswith("query")
            result |= {"search": search, "exclude_bought": True, "held_out_categories": 7 * search}
            result["top"] = {"recall@10": dict.fromkeys(models, seed / 10), "ndcg@5": dict.fromkeys(models, 0.3)}
        metrics = {"k": 100, "seed": seed, "tasks": tasks, "mean_recall": means.groupby("model").mean().to_dict()}
        schema = pa.schema([HITS.field(name) for name in OLD]) if old else HITS
        hits = {"hits": write(folder / "hits.parquet", schema, rows)}
        put(folder, "evaluate", hits, config=config, fingerprint=folder.name, metrics=metrics)
        return str(folder)

    return make


def test_means_deviations_and_pooled_lifts(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [read_run(make_run("beauty", seed), CONFIGS) for seed in (0, 1, 2)]
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
    assert summary.baseline.examples.tolist() == [180, 180, 180]
    assert summary.best is not None and summary.best.names == ("urm", "sasrec")
    behaviour, search = ("next_item", "tail_item"), ("unseen_category_query",)
    assert summary.groups == {"behaviour tasks": behaviour, "search tasks": search}
    for kind, tasks in summary.groups.items():
        rows = frame.loc[f"mean of {kind}"]
        assert rows["mean"].to_dict() == pytest.approx(
            {model: frame.loc[[(task, model) for task in tasks], "mean"].mean() for model in QUALITY}
        )
        ratio = rows.loc["urm", "mean"] / rows.loc["target_attention", "mean"] - 1
        assert rows.loc["urm", "lift"] == pytest.approx(ratio)
        assert rows.loc["urm", "low"] < ratio < rows.loc["urm", "high"]
        for run, ratio in zip(runs, summary.ratios(tasks), strict=True):
            of_tasks = [run.metrics["tasks"][task]["recall"] for task in tasks]
            urm, rival = (sum(recall[model] for recall in of_tasks) for model in ("urm", "target_attention"))
            assert ratio == pytest.approx(urm / rival - 1)


def test_three_seeds_narrow_the_interval_of_one(make_run: MakeRun, tmp_path: Path) -> None:
    runs = [read_run(make_run("beauty", seed), CONFIGS) for seed in (0, 1, 2)]
    widths = []
    for part in (runs[:1], runs):
        low, high = summarise_runs(part, cache=tmp_path, draws=300)[0].baseline.ratio_interval(0.95)
        widths.append(high - low)
    assert widths[1] < widths[0]


def test_table_and_mlflow(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run("beauty", 0), make_run("beauty", 1), make_run("toys", 0)]
    text = compare_runs(folders, settings=Settings(home=tmp_path / "home"), draws=200, confidence=0.95)
    assert "## beauty: Recall@100, seeds 0, 1" in text
    assert "## toys: Recall@100, seeds 0" in text
    assert text.count("| next_item | 120 |") == text.count("| next_item | 60 |") == 1
    assert "| **mean** | 240 |" in text and "| **mean** | 120 |" in text  # of behaviour tasks, and of the query
    assert text.count("±") == 3 * (len(TASKS) + 2)  # a single seed has no deviation
    assert text.count("| next_item | 120 | filtered |") == 1
    assert text.count("The interval of unseen_category_query draws its held-out categories (7)") == 2
    assert "| tail_item | recall@10 | 0.0500 |" in text  # of seeds 0 and 1
    assert text.count("Best of the other models in the mean is SASRec.") == 2
    assert text.count("With chance from training to training (") == 2  # of each kind of task, where there are two seeds
    found = mlflow.search_runs(experiment_names=["comparison"], output_format="list")
    table = mlflow.load_table("comparison.json", run_ids=[found[0].info.run_id])
    assert len(table) == 2 * (len(TASKS) + 2) * len(QUALITY)
    assert {"beauty.behaviour.lift", "toys.search.lift_low"} <= set(found[0].data.metrics)


def test_models_that_a_run_lacks_are_left_out_and_named(make_run: MakeRun, tmp_path: Path) -> None:
    folders = [make_run("beauty", 0), make_run("beauty", 1, ("target_attention", "urm"))]
    summary = summarise_runs([read_run(folder, CONFIGS) for folder in folders], cache=tmp_path, draws=100)[0]
    assert (summary.models, summary.left_out) == (("target_attention", "urm"), ("sasrec",))
    assert set(summary.recalls["model"]) == {"target_attention", "urm"}
    assert summary.best is not None and summary.best.names == ("urm", "target_attention")
    text = compare_runs(folders, settings=Settings(home=tmp_path / "home"), draws=100, confidence=0.95)
    assert "Not every run has SASRec, left out here." in text


def test_runs_that_cannot_be_pooled_are_refused(make_run: MakeRun, tmp_path: Path) -> None:
    once = read_run(make_run("beauty", 0), CONFIGS)
    with pytest.raises(DataError, match=r"expected another seed, .* got seed 0"):
        summarise_runs([once, once], cache=tmp_path, draws=100)
    other = read_run(make_run("beauty", 1), CONFIGS)
    del other.metrics["tasks"]["tail_item"]
    with pytest.raises(DataError, match=r"tasks and settings of .*, got others"):
        summarise_runs([once, other], cache=tmp_path, draws=100)
    again, third = (read_run(make_run("beauty", seed), CONFIGS) for seed in (2, 3))
    once.metrics["settings"], again.metrics["settings"] = "one", "another"
    with pytest.raises(DataError, match="got others"):
        summarise_runs([once, again], cache=tmp_path, draws=100)
    assert summarise_runs([once, third], cache=tmp_path, draws=100)[0].seeds == (0, 3)  # a record that does not say
    with pytest.raises(DataError, match="got others"):  # nor do those agree that say
        summarise_runs([third, once, again], cache=tmp_path, draws=100)
    third.kinds["tail_item"] = replace(third.kinds["tail_item"], exclude_bought=False)
    with pytest.raises(DataError, match="got others"):
        summarise_runs([once, third], cache=tmp_path, draws=100)
    with pytest.raises(MissingInputError, match="the result of stage 'evaluate'"):
        read_run(str(tmp_path / "nowhere"), CONFIGS)


def test_an_older_record_goes_on_comparing_and_says_what_it_lacks(make_run: MakeRun, tmp_path: Path) -> None:
    old, new = make_run("amazon_beauty", 0, old=True), make_run("amazon_beauty", 0)
    whole, without = (summarise_runs([read_run(run, CONFIGS)], cache=tmp_path, draws=200)[0] for run in (new, old))
    assert without.groups == whole.groups  # by the configuration
    behaviour = whole.groups["behaviour tasks"]
    assert without.baseline.restrict(behaviour).ratio == whole.baseline.restrict(behaviour).ratio
    assert np.array_equal(without.baseline.model_draws[:, :2], whole.baseline.model_draws[:, :2])
    assert (without.baseline.categories.tolist(), whole.baseline.categories.tolist()) == ([0, 0, 0], [0, 0, 7])
    settings = Settings(home=tmp_path / "home", configs_dir=CONFIGS)
    text = compare_runs([old], settings=settings, draws=100, confidence=0.95)
    assert "The interval of unseen_category_query draws users alone, since a record lacks the categories" in text
    assert "Not every record has recall@5, recall@10, ndcg@5, ndcg@10." in text


def test_a_best_model_without_hits_has_no_interval(make_run: MakeRun, tmp_path: Path) -> None:
    run = read_run(make_run("beauty", 0), CONFIGS)
    for result in run.metrics["tasks"].values():
        result["recall"]["item_knn"] = 0.9
    run.metrics["mean_recall"]["item_knn"] = 0.9
    for result in run.metrics["tasks"].values():
        result["top"] = {}
    summary = summarise_runs([run], cache=tmp_path, draws=100)[0]
    assert (summary.best_name, summary.best) == ("item_knn", None)
    assert "Its per-example record was not kept" in render([summary], 0.95)
