"""Stage evaluate and, on its result, stage gate, with a real (tiny, untrained) URM."""

import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.addresses import write_json
from components.config import RunConfig
from components.evaluation.examples import TestExamples, measure
from components.evaluation.models import evaluate_models
from components.evaluation.report import render_report
from components.exceptions import DataError, MissingInputError
from components.schemas.hits import HITS
from components.schemas.predictions import PREDICTIONS
from components.settings import Settings
from components.stages import evaluate, gate
from components.storage import StageResult, run_stage
from tests.worlds import make_settings
from tests.worlds.finished import *  # noqa: F403  # fixtures
from tests.worlds.finished import IDS
from tests.worlds.tables import CUT, put, write

ASKED = {"next_purchase", "new_item", "text_query"}
MODELS = ["popularity", "own_history", "sasrec", "some_other", "target_attention", "urm"]  # in the order of the tables


@pytest.fixture(scope="module")
def run_dir(finished: tuple[Path, RunConfig]) -> Path:
    return finished[0]


@pytest.fixture(scope="module")
def inputs(run_dir: Path) -> Path:
    return run_dir.parents[1] / "files"


@pytest.fixture(scope="module")
def config(finished: tuple[Path, RunConfig]) -> RunConfig:
    """The query of the search task counts as held out, so that its category is drawn, too."""
    run = finished[1]
    held_out = run.task("text_query").target.model_copy(update={"held_out_query": True})
    tasks = [task.model_copy(update={"target": held_out}) if task.needs_query else task for task in run.tasks]
    return run.model_copy(update={"tasks": tuple(tasks)})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return make_settings(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def evaluation(config: RunConfig, run_dir: Path, home: Settings) -> StageResult:
    return run_stage("evaluate", evaluate.run, config=config, run_dir=str(run_dir), settings=home)


def test_urm_is_ranked_under_the_same_filter(evaluation: StageResult, inputs: Path) -> None:
    predictions = pq.read_table(evaluation.outputs["predictions"])
    assert predictions.schema == PREDICTIONS
    assert set(predictions.column("model").to_pylist()) == {"urm"}
    examples = {row["example_id"]: row for row in pq.read_table(inputs / "examples.parquet").to_pylist()}
    contexts = {row["context_id"]: row for row in pq.read_table(inputs / "contexts.parquet").to_pylist()}
    assert len(predictions) == 96
    for row in predictions.to_pylist():
        example = examples[row["example_id"]]
        history = set(contexts[example["context_id"]]["history_item_ids"])
        expected = 60 - len(history) if example["task"] == "new_item" else 60
        assert len(set(row["item_ids"])) == expected
        assert np.all(np.diff(row["scores"]) <= 0)


def test_metrics_can_be_recomputed_from_the_hits(evaluation: StageResult) -> None:
    hits = pq.read_table(evaluation.outputs["hits"])
    assert hits.schema == HITS
    frame = hits.to_pandas()
    assert set(frame["k"]) == {5, 10, 20, 100, 500}
    assert list(dict.fromkeys(frame["model"])) == MODELS
    frame["recall"] = frame["hits"] / np.minimum(frame["targets"], frame["k"])
    metrics = evaluation.metrics
    every = frame.groupby(["task", "model", "k"])[["recall", "ndcg"]].mean()
    for task, result in metrics["tasks"].items():
        assert set(result["top"]) == {"recall@5", "recall@10", "ndcg@5", "ndcg@10"}
        for metric, values in result["top"].items():
            name, _, k = metric.partition("@")
            assert values == pytest.approx({model: every.loc[(task, model, int(k)), name] for model in MODELS})
    held_out = frame[frame["task"] == "text_query"]["held_out_query"]
    assert set(held_out) == {"milk"} and frame["held_out_query"].notna().sum() == len(held_out)
    assert (frame["cut_ts"] == CUT).all()
    means = frame[frame["k"] == 10].groupby(["task", "model"])["recall"].mean()
    assert set(metrics["tasks"]) == ASKED
    for task, result in metrics["tasks"].items():
        assert result["recall"] == pytest.approx({model: means[task, model] for model in MODELS})
        assert result["lift"] == pytest.approx(means[task, "urm"] / means[task, "target_attention"] - 1)
        if task == "text_query":  # of one held-out category, which proves nothing
            assert (result["held_out_categories"], result["low"], result["high"], result["p_value"]) == (
                1,
                None,
                None,
                1,
            )
        else:
            assert result["low"] <= result["lift"] <= result["high"]
        assert result["examples"] == 32
        assert result["baseline"] == pytest.approx(result["recall"]["target_attention"])
        assert result["urm"] == pytest.approx(result["recall"]["urm"])
    assert [task for task, result in metrics["tasks"].items() if result["search"]] == ["text_query"]
    assert [task for task, result in metrics["tasks"].items() if result["exclude_bought"]] == ["new_item"]
    for group, asked in ((metrics, ["next_purchase", "new_item"]), (metrics["search"], ["text_query"])):
        of_tasks = [metrics["tasks"][task] for task in asked]
        recalls = {model: np.mean([means[task, model] for task in asked]) for model in MODELS}
        assert group["mean_recall"] == pytest.approx(recalls)
        assert group["lift"] == pytest.approx(recalls["urm"] / recalls["target_attention"] - 1)
        assert group["mean_lift"] == pytest.approx(np.mean([result["lift"] for result in of_tasks]))
        for name in ("lift", "mean_lift"):
            if group is metrics:
                assert group[f"{name}_low"] <= group[name] <= group[f"{name}_high"]
            else:
                assert group[f"{name}_low"] is None is group[f"{name}_high"]
        assert group["tasks_won"] == sum(result["lift"] > 0 and result["p_value"] < 0.05 for result in of_tasks)


def test_ceiling_is_reached_by_some_model_or_by_two_together(evaluation: StageResult) -> None:
    ceiling = evaluation.metrics["ceiling"]
    assert set(ceiling["tasks"]) == ASKED
    for task, best in ceiling["tasks"].items():
        recalls = evaluation.metrics["tasks"][task]["recall"] | {"ensemble": best["ensemble"]}
        assert best["recall"] == pytest.approx(max(recalls.values())) == pytest.approx(recalls[best["by"]])
    assert 0 < ceiling["share"] <= 1
    assert "## Ceiling" in Path(evaluation.outputs["report"]).read_text()


def test_report_names_every_task_and_what_is_not_compared(evaluation: StageResult) -> None:
    report = Path(evaluation.outputs["report"]).read_text()
    lines = [line for line in report.splitlines() if line.startswith("| ")]
    for task, result in evaluation.metrics["tasks"].items():
        line = next(line for line in lines if line.startswith(f"| {task} |"))
        assert f"{result['recall']['urm']:.4f}" in line
        assert f"{100 * result['lift']:+.1f} %" in line
    behaviour, search = (report.index(f"## {kind} tasks") for kind in ("Behaviour", "Search"))
    assert behaviour < report.index("| next_purchase | 32 | kept |") < search
    assert (
        behaviour < report.index("| new_item | 32 | filtered |") < search < report.index("| text_query | 32 | kept |")
    )
    assert "The interval of text_query draws its held-out categories (1) as well as the users." in report
    top = evaluation.metrics["tasks"]["new_item"]["top"]["ndcg@10"]
    assert f"| new_item | ndcg@10 | {top['popularity']:.4f} |" in report
    assert "Without test examples, and so not compared: long_tail." in report
    assert Path(evaluation.outputs["figure"]).read_bytes().startswith(b"\x89PNG")


def test_report_says_that_empty_lists_have_no_popularity_and_no_novelty(
    evaluation: StageResult, config: RunConfig, inputs: Path, tmp_path: Path
) -> None:
    tables = {name: pq.read_table(inputs / f"{name}.parquet") for name in ("examples", "contexts", "catalogue")}
    tables["examples"] = tables["examples"].filter(pc.field("split") == "test")
    lists = pq.read_table(inputs / "predictions.parquet").to_pylist()
    lists = [row | {"item_ids": [], "scores": []} if row["model"] == "own_history" else row for row in lists]
    files = (write(tmp_path / "lists.parquet", PREDICTIONS, lists), Path(evaluation.outputs["predictions"]))
    found = evaluate_models(TestExamples.build(**tables), files, config, tmp_path / "hits.parquet")
    report = render_report(config, found.metrics, found.table, found.segments)
    assert re.search(r"\| own history \| 0\.0000 \|.* 0\.0000 \| undefined \| undefined \|", report)
    assert "| nan " not in report


def test_mlflow_holds_table_figure_and_data_set(evaluation: StageResult, config: RunConfig) -> None:
    runs = mlflow.search_runs(
        experiment_names=[config.name], filter_string="tags.`urm.stage` = 'evaluate'", output_format="list"
    )
    run = runs[0]
    for name in ("lift", "lift_low", "mean_lift"):
        assert run.data.metrics[name] == pytest.approx(evaluation.metrics[name])
    for name in ("lift", "mean_lift"):
        assert run.data.metrics[f"search.{name}"] == pytest.approx(evaluation.metrics["search"][name])
    assert "search.lift_low" not in run.data.metrics  # of one held-out category
    assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["complete_journey.test"]
    files = {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}
    assert {"metrics.json", "figure.png", "report.md"} <= files
    table = mlflow.load_table("metrics.json", run_ids=[run.info.run_id])
    assert len(table) == len(ASKED) * len(MODELS)
    measures = {"recall@10", "recall@500", "ndcg@5", "coverage@10", "popularity_bias@10", "novelty@10"}
    assert measures <= set(table.columns)


def with_policy(config: RunConfig, min_lift: float) -> RunConfig:
    """Only the lift and the best other model count."""
    policy = {"min_lift": min_lift, "min_tasks_won": 0, "max_task_loss": 1.0}
    evaluation_config = config.evaluation.model_copy(update={"gate": config.evaluation.gate.model_copy(update=policy)})
    return config.model_copy(update={"evaluation": evaluation_config})


@pytest.mark.parametrize(("needed", "passed"), [(-1.0, True), (50.0, False)])
def test_gate_succeeds_as_a_stage_whatever_the_verdict(
    evaluation: StageResult, config: RunConfig, run_dir: Path, home: Settings, needed: float, passed: bool
) -> None:
    result = run_stage("gate", gate.run, config=with_policy(config, needed), run_dir=str(run_dir), settings=home)
    assert result.metrics["passed"] is passed
    assert len(result.metrics["reasons"]) == (0 if passed else 1)
    assert json.loads(Path(result.outputs["verdict"]).read_text()) == result.metrics
    parent = json.loads((run_dir / "tracking.json").read_text())["run_id"]
    tags = mlflow.get_run(parent).data.tags
    assert tags["urm.gate"] == ("passed" if passed else "failed")
    assert tags["urm.verdict"] == result.metrics["verdict"]


def test_a_rival_that_finds_everything_refuses_the_gate(
    evaluation: StageResult, config: RunConfig, inputs: Path, home: Settings, tmp_path: Path
) -> None:
    """Target attention, which finds little, is not the only model that URM must not lose to."""
    tables = {name: pq.read_table(inputs / f"{name}.parquet") for name in ("examples", "contexts", "catalogue")}
    tables["examples"] = tables["examples"].filter(pc.field("split") == "test")
    targets = {row["example_id"]: row["target_item_ids"] for row in tables["examples"].to_pylist()}
    lists = pq.read_table(inputs / "predictions.parquet").to_pylist()
    perfect = [row | {"item_ids": targets[row["example_id"]]} for row in lists if row["model"] == "some_other"]
    rest = [row for row in lists if row["model"] != "some_other"]
    predictions = write(tmp_path / "lists.parquet", PREDICTIONS, rest + perfect)
    files = (predictions, Path(evaluation.outputs["predictions"]))
    metrics = evaluate_models(TestExamples.build(**tables), files, config, tmp_path / "hits.parquet").metrics
    assert metrics["best_other"]["model"] == "some_other"
    put(tmp_path / "runs" / "beaten", "evaluate", {"hits": tmp_path / "hits.parquet"}, metrics=metrics)
    run_dir = str(tmp_path / "runs" / "beaten")
    result = run_stage("gate", gate.run, config=with_policy(config, -1.0), run_dir=run_dir, settings=home)
    assert result.metrics["passed"] is False
    (reason,) = result.metrics["reasons"]
    assert reason.startswith("Proven behind some other, the best of the other models in the mean over the behaviour")


def test_the_gate_finds_trainings_of_equal_settings_in_the_index(
    evaluation: StageResult, config: RunConfig, home: Settings, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for name, other in {"1": {"seed": 1}, "2": {"seed": 2}, "same seed": {}, "k": {"seed": 3, "k": 1}}.items():
        lift = {"lift": evaluation.metrics["lift"] + 0.01}
        result = evaluation.model_copy(update={"metrics": evaluation.metrics | lift | other})
        write_json(str(runs / ".stages" / "evaluate" / f"{name}.json"), result.model_dump(mode="json"))
    write_json(str(runs / "now" / "evaluate" / "result.json"), evaluation.model_dump(mode="json"))
    result = run_stage("gate", gate.run, config=with_policy(config, -1.0), run_dir=str(runs / "now"), settings=home)
    assert "With chance of training, over 3 trainings" in result.metrics["verdict"]


def test_a_target_attention_that_its_time_limit_ended_refuses_the_gate(
    evaluation: StageResult, config: RunConfig, home: Settings, tmp_path: Path
) -> None:
    metrics = evaluation.metrics | {"cut_short": ["target_attention"]}
    run_dir = tmp_path / "runs" / "short"
    put(run_dir, "evaluate", {"hits": Path(evaluation.outputs["hits"])}, metrics=metrics)
    result = run_stage("gate", gate.run, config=with_policy(config, -1.0), run_dir=str(run_dir), settings=home)
    (reason,) = result.metrics["reasons"]
    assert reason.startswith("The time limit ended the training of target attention, so that")


@pytest.mark.parametrize("name", ["cut_short", "best_other"])
def test_an_evaluation_of_older_code_is_refused_in_a_sentence(
    evaluation: StageResult, config: RunConfig, home: Settings, tmp_path: Path, name: str
) -> None:
    metrics = {key: value for key, value in evaluation.metrics.items() if key != name}
    run_dir = tmp_path / "runs" / "older"
    put(run_dir, "evaluate", {"hits": Path(evaluation.outputs["hits"])}, metrics=metrics)
    sentence = f"stage gate: expected metric '{name}' of stage 'evaluate', got none; run `urm evaluate` again"
    with pytest.raises(MissingInputError, match=re.escape(sentence)):
        run_stage("gate", gate.run, config=config, run_dir=str(run_dir), settings=home)


def test_runs_that_differ_in_seed_place_and_rivals_alone_have_one_digest_of_their_settings(
    evaluation: StageResult, config: RunConfig, inputs: Path, tmp_path: Path
) -> None:
    tables = {name: pq.read_table(inputs / f"{name}.parquet") for name in ("examples", "contexts", "catalogue")}
    tables["examples"] = tables["examples"].filter(pc.field("split") == "test")
    test = TestExamples.build(**tables)
    files = [inputs / "predictions.parquet", Path(evaluation.outputs["predictions"])]

    def digest(**changes: object) -> str:
        changed = config.model_copy(update=changes)
        return str(evaluate_models(test, files, changed, tmp_path / "hits.parquet").metrics["settings"])

    rivals, urm = config.baseline.model_copy(update={"models": ("sasrec",)}), config.urm
    source = config.source.model_copy(update={"data_dir": tmp_path})
    assert digest(seed=5, source=source, baseline=rivals) == evaluation.metrics["settings"]
    others = [
        digest(urm=urm.model_copy(update={"max_steps": urm.max_steps + 1})),
        digest(baseline=config.baseline.model_copy(update={"max_epochs": config.baseline.max_epochs + 1})),
        digest(items=config.items.model_copy(update={"id_ensemble": config.items.id_ensemble + 1})),
    ]
    assert len({evaluation.metrics["settings"], *others}) == 4


def test_predictions_of_other_examples_are_refused(inputs: Path) -> None:
    tables = {name: pq.read_table(inputs / f"{name}.parquet") for name in ("examples", "contexts", "catalogue")}
    tables["examples"] = tables["examples"].filter(pc.field("split") == "test")
    test = TestExamples.build(**tables)
    predictions: pa.Table = pq.read_table(inputs / "predictions.parquet")
    mine = predictions.filter(pc.field("model") == "sasrec").slice(1)
    with pytest.raises(DataError, match="predictions of sasrec: expected one list for each of 96 test examples"):
        measure(test, mine, "sasrec", 10)


def test_segments_split_users_and_targets(evaluation: StageResult, inputs: Path) -> None:
    segments = pd.read_parquet(evaluation.outputs["segments"]).set_index(["segment", "task", "model"])
    users = segments["examples"].unstack("segment")[["light users", "heavy users"]]
    assert (users.loc["all"].sum(axis=1) == 96).all()
    new = set(IDS[-3:].tolist())
    rows = [row for row in pq.read_table(inputs / "examples.parquet").to_pylist() if row["split"] == "test"]
    asked = {row["example_id"]: new & set(row["target_item_ids"]) for row in rows}
    asked = {example: targets for example, targets in asked.items() if targets}
    lists = pq.read_table(inputs / "predictions.parquet", filters=pc.field("model") == "sasrec").to_pylist()
    pairs = [(asked[row["example_id"]], row["item_ids"][:10]) for row in lists if row["example_id"] in asked]
    recalls = [len(targets & set(items)) / len(targets) for targets, items in pairs]
    found = segments.loc["new targets", "all", "sasrec"]
    assert len(recalls) == found["examples"] > 0
    assert found["recall@10"] == pytest.approx(np.mean(recalls))


def test_best_other_model_is_named_with_its_interval(evaluation: StageResult) -> None:
    metrics = evaluation.metrics
    asked = [metrics["tasks"][task]["recall"] for task in ("next_purchase", "new_item")]
    means = {model: np.mean([recall[model] for recall in asked]) for model in MODELS if model != "urm"}
    best = metrics["best_other"]
    assert means[best["model"]] == max(means.values())
    assert best["difference"] == pytest.approx(metrics["mean_recall"]["urm"] - max(means.values()))
    assert best["low"] <= best["difference"] <= best["high"]
    report = Path(evaluation.outputs["report"]).read_text()
    assert f"the difference in mean recall is {best['difference']:+.4f}" in report
    assert "| new targets |" in report
    assert metrics["cut_short"] == ["sasrec"]
    assert "Trainings that their time limit ended: SASRec." in report
