import json
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from components.cli.app import app
from components.config import load_config, load_named_config
from components.exceptions import ConfigError, DataError, MissingInputError
from components.flow import STUDIES
from components.settings import Settings, get_settings
from components.storage import run_stage
from components.studies.ablation import figures
from components.studies.ablation.figures import draw_group
from components.studies.ablation.grid import REFERENCE, Grid, digest_settings, variant_dir
from components.studies.ablation.summary import compare, compare_tasks, fit_slope, summarise
from tests.worlds import CONFIGS
from tests.worlds.tables import put

VECTORS = {f"h_{number}": {"urm.num_user_vectors": number} for number in (1, 2)}
GROUPS = {
    "vectors": {"title": "Number of vectors", "variants": VECTORS},
    "combine": {"title": "Combination", "variants": {"mean": {"urm.combine": "mean"}}},
}
CONTRASTS = {"mean minus h_1": ("mean", "h_1")}
GRID = Grid.model_validate({"description": "Tiny.", "seeds": [0, 1], "groups": GROUPS, "contrasts": CONTRASTS})


def recalls(shift=0.0, noise=0.0, num_users=40):
    random = np.random.default_rng(0)
    tasks = enumerate(["next", "new"] * num_users)
    rows = [(seed, number, f"u{number % num_users}", task) for number, task in tasks for seed in (0, 1)]
    frame = pd.DataFrame(sorted(rows), columns=["seed", "example_id", "user_id", "task"])
    base = random.uniform(0.2, 0.6, len(frame))
    return frame.assign(recall=base + shift + noise * np.random.default_rng(1).normal(size=len(frame)))


def test_a_constant_gain_is_certain():
    result = compare(recalls(shift=0.1), recalls(), seed=0)
    assert result["difference"] == pytest.approx(0.1)
    assert (result["low"], result["high"]) == (pytest.approx(0.1), pytest.approx(0.1))
    assert (result["seeds"], result["examples"]) == (2, 160)


def test_value_is_the_mean_over_tasks_and_seeds_and_spread_that_over_seeds():
    columns = ["seed", "example_id", "user_id", "task", "recall"]
    rows = [(0, 0, "a", "next", 0.0), (0, 1, "a", "next", 0.5), (0, 2, "b", "new", 1.0), (1, 0, "a", "next", 0.5)]
    frame = pd.DataFrame([*rows, (1, 1, "b", "new", 0.5)], columns=columns)
    result = compare(frame, frame.assign(recall=0.0), seed=0)
    assert result["recall"] == pytest.approx(((0.25 + 1) / 2 + 0.5) / 2)
    assert result["spread"] == pytest.approx(np.std([0.625, 0.5], ddof=1))
    # Pooled over seeds: "next" has the examples 0, .5, .5 and "new" has 1, .5.
    assert result["difference"] == pytest.approx((1 / 3 + 0.75) / 2)


def test_noise_without_a_gain_gives_an_interval_over_zero_that_narrows_with_users():
    few, many = (compare(recalls(noise=0.1, num_users=n), recalls(num_users=n), seed=0) for n in (20, 400))
    assert many["low"] < 0 < many["high"]
    assert many["high"] - many["low"] < few["high"] - few["low"]


def test_a_draw_that_misses_a_task_is_not_the_mean_of_others():
    """A hundred users of one task gain nothing, one user of another .5: with him the mean of both is always .25."""
    tasks = ["next"] * 100 + ["new"]
    frame = pd.DataFrame({"seed": 0, "example_id": range(101), "user_id": [f"u{n}" for n in range(101)], "task": tasks})
    variant = frame.assign(recall=0.5 * (frame["task"] == "new"))
    result = compare(variant, frame.assign(recall=0.0), seed=0)
    assert (result["difference"], result["low"], result["high"]) == (0.25, 0.25, 0.25)


def test_a_seed_that_one_of_them_lacks_is_left_out():
    variant = recalls()
    result = compare(variant, variant[variant["seed"] == 0], seed=0)
    assert (result["examples"], result["difference"]) == (80, 0)


@pytest.mark.parametrize("end", ["variant", "reference"])
def test_different_examples_are_not_compared(end):
    """`example_id` is a row number: other features or tasks give it to other examples."""
    frames = {"variant": recalls(), "reference": recalls()}
    frames[end] = frames[end].assign(user_id=frames[end]["user_id"].replace("u1", "another"))
    with pytest.raises(
        DataError, match=r"validation examples of a study: .*got 160 and 160, of which 156 are the same"
    ):
        compare(*frames.values(), seed=0)
    frames[end] = recalls()[lambda frame: frame["example_id"] > 0]
    with pytest.raises(DataError, match="of which 158 are the same"):
        compare(*frames.values(), seed=0)
    with pytest.raises(DataError):
        fit_slope(frames, {"variant": 1.0, "reference": 2.0}, seed=0)


def test_a_contrast_per_task_pairs_users_and_ends_with_the_mean():
    variant = recalls(noise=0.1)
    variant.loc[variant["task"] == "new", "recall"] += 0.1
    result = compare_tasks(variant, recalls(), seed=0)
    assert list(result) == ["new", "next", "mean"]
    assert result["new"]["low"] > 0.05 > result["next"]["high"] > 0 > result["next"]["low"]
    assert result["mean"] == compare(variant, recalls(), seed=0)


@pytest.mark.parametrize(("numbers", "per_doubling", "slope"), [((1, 2, 8), True, 0.02), ((0, 1, 3), False, 0.02)])
def test_a_slope_is_that_of_least_squares_with_an_interval_over_users(numbers, per_doubling, slope):
    """The users' own levels cancel out; only the noise of a variant widens the interval."""
    steps = np.log2(numbers) if per_doubling else np.array(numbers)
    curve = {str(number): recalls(shift=0.02 * step) for number, step in zip(numbers, steps, strict=True)}
    places = {str(number): float(number) for number in numbers} | {REFERENCE: float(numbers[-1])}  # twice: counts once
    result = fit_slope(curve | {REFERENCE: curve[str(numbers[-1])]}, places, seed=0)
    assert result == {
        "slope": pytest.approx(slope), "low": pytest.approx(slope), "high": pytest.approx(slope),
        "per_doubling": per_doubling,
    }  # fmt: skip
    bent = curve | {str(numbers[-1]): recalls(shift=0.1, noise=0.05)}
    bent_result = fit_slope(bent, {name: places[name] for name in bent}, seed=0)
    means = [frame["recall"].mean() for frame in bent.values()]
    assert bent_result["slope"] == pytest.approx(np.polyfit(steps, means, 1)[0])
    assert bent_result["low"] < bent_result["slope"] < bent_result["high"]


@pytest.fixture
def study(tmp_path):
    shifts = {REFERENCE: 0.0, "h_1": -0.1, "h_2": -0.05, "mean": 0.02}
    run_dir = tmp_path / "runs" / "study"
    for variant, shift in shifts.items():
        frame = recalls(shift)
        for seed in GRID.seeds:
            folder = tmp_path / "runs" / variant_dir("study", variant, seed)
            folder.mkdir(parents=True)
            frame[frame["seed"] == seed].drop(columns="seed").to_parquet(folder / "recalls.parquet")
            put(folder, "measure", {"recalls": folder / "recalls.parquet"})
            put(folder, "sft", {})
    return run_dir


def summary(study, tmp_path, grid=GRID, name="complete_journey", overrides=None):
    def configure(variant):
        return load_config(CONFIGS / f"{name}.yaml", (overrides or {}) | grid.overrides | grid.variants[variant])

    digests = {variant: digest_settings(configure(variant)) for variant in grid.variants}
    options = {"config": configure(REFERENCE), "settings": Settings(home=tmp_path / "home"), "run_dir": str(study)}
    return run_stage(STUDIES["ablation_summary"], lambda stage: summarise(stage, grid, digests), **options)


def test_summary_writes_table_report_and_figures_and_tracks_them(study, tmp_path):
    result = summary(study, tmp_path)
    rows = {row["variant"]: row for row in result.metrics["variants"]}
    assert list(rows) == [REFERENCE, "h_1", "h_2", "mean"]
    assert rows["h_1"]["difference"] == pytest.approx(-0.1)
    report = (study / "ablation_summary").glob("*/report.md")
    text = next(report).read_text()
    assert "## Number of vectors" in text
    assert "| h_1 | " in text
    assert "-0.1000 | -0.1000 … -0.1000" in text
    slope = result.metrics["slopes"]["vectors"]["slope"]  # of -.1 at 1, -.05 at 2 and 0 at the reference's 8
    assert slope == pytest.approx(np.polyfit([0, 1, 3], [-0.1, -0.05, 0.0], 1)[0])
    assert f"Slope: {slope:+.5f} per doubling of `urm.num_user_vectors` ({slope:+.5f} … {slope:+.5f})." in text
    assert "## mean minus h_1\n\n| task | examples | difference | interval |" in text
    assert "| next | 80 | +0.1200 | +0.1200 … +0.1200 |" in text
    for name in ("vectors", "combine"):
        assert (Path(result.outputs["figures"]) / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    runs = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`urm.stage` = 'ablation_summary'")
    assert runs["metrics.recall.h_2"].iloc[0] == pytest.approx(rows["h_2"]["recall"])
    files = {entry.path for entry in mlflow.MlflowClient().list_artifacts(runs["run_id"].iloc[0])}
    assert {"report.md", "vectors.png", "combine.png", "ablations.json"} <= files


def test_one_seed_has_no_spread(study, tmp_path):
    forget(tmp_path, f"study.{REFERENCE}.seed1")
    result = summary(study, tmp_path, GRID.of_seed(0))
    assert {row["spread"] for row in result.metrics["variants"]} == {None}
    text = Path(result.outputs["report"]).read_text()
    assert "(one seed, " in text
    assert re.search(r"\| h_1 \| 0\.\d{4} \|  \| -0\.1000 \|", text)


def test_variants_without_all_seeds_are_left_out_and_named(study, tmp_path):
    everything = {row["variant"]: row for row in summary(study, tmp_path).metrics["variants"]}
    for variant in ("h_1", "mean"):
        forget(tmp_path, f"study.{variant}.seed1")
    result = summary(study, tmp_path)
    assert {row["variant"]: row for row in result.metrics["variants"]} == {
        variant: everything[variant] for variant in (REFERENCE, "h_2")
    }
    text = Path(result.outputs["report"]).read_text()
    assert "Not measured with all seeds and the settings of the grid, and left out: h_1, mean." in text
    assert "## Number of vectors" in text
    assert "## Combination" not in text
    assert [path.name for path in Path(result.outputs["figures"]).iterdir()] == ["vectors.png"]


def test_variants_whose_training_the_clock_ended_are_named(study, tmp_path):
    assert "max_seconds" not in Path(summary(study, tmp_path).outputs["report"]).read_text()
    for variant, stopped_by in {"h_1": "time", "h_2": "patience", "mean": "steps"}.items():
        folder = tmp_path / "runs" / variant_dir("study", variant, 1)
        put(folder, "sft", metrics={"training": {"stopped_by": stopped_by, "steps": 7}}, fingerprint="again")
    forget(tmp_path, "study.mean.seed0")
    result = summary(study, tmp_path)
    assert [row["variant"] for row in result.metrics["variants"] if row["by_clock"]] == ["h_1"]
    said = "Ended by `urm.max_seconds`, so that the speed of the machine counts: h_1."
    assert said in Path(result.outputs["report"]).read_text()


def test_without_the_reference_the_command_that_makes_it_is_named(study, tmp_path):
    forget(tmp_path, f"study.{REFERENCE}.seed1")
    with pytest.raises(MissingInputError, match=r"'main' with seed 1 .*ablation run --variant main --seed 1"):
        summary(study, tmp_path)


def test_without_any_variant_there_is_nothing_to_compare(study, tmp_path):
    for variant in ("h_1", "h_2", "mean"):
        forget(tmp_path, f"study.{variant}.seed0")
    with pytest.raises(MissingInputError, match=r"'h_1' with seed 0 .*ablation run --variant h_1 --seed 0"):
        summary(study, tmp_path)


def test_a_study_of_another_configuration_or_of_other_settings_is_refused(study, tmp_path):
    with pytest.raises(ConfigError, match=r"was measured \(complete_journey\), got amazon_beauty, or other settings"):
        summary(study, tmp_path, name="amazon_beauty")
    overrides = {"urm.max_steps": 7, "seed": 1}
    config = load_config(CONFIGS / "complete_journey.yaml", overrides)
    for seed in GRID.seeds:
        folder = tmp_path / "runs" / variant_dir("study", REFERENCE, seed)
        put(folder, "measure", {"recalls": folder / "recalls.parquet"}, metrics={"settings": digest_settings(config)})
    with pytest.raises(ConfigError, match=r"give the --config and --set of `urm ablation run`"):
        summary(study, tmp_path)
    assert summary(study, tmp_path, overrides=overrides).metrics["variants"]


def test_a_variant_that_was_measured_as_something_else_is_left_out_and_named(study, tmp_path, configs, monkeypatch):
    """As the command does it: a variant of the grid was edited after it had been measured."""
    monkeypatch.setenv("URM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("URM_CONFIGS_DIR", str(configs))
    get_settings.cache_clear()
    grid = GRID.model_copy(update={"overrides": {"urm.learning_rate": 0.01}}, deep=True)
    for variant in grid.variants:
        for seed in grid.seeds:
            given = ["urm.max_steps=7", *grid.settings_of(variant, seed)]  # those of `urm ablation measure`
            folder = tmp_path / "runs" / variant_dir("study", variant, seed)
            metrics = {"settings": digest_settings(load_named_config("complete_journey", configs, given))}
            put(folder, "measure", {"recalls": folder / "recalls.parquet"}, metrics=metrics)
    file = tmp_path / "grid.yaml"
    options = ["--grid", str(file), "--config", "complete_journey", "--run-dir", str(study), "--set", "urm.max_steps=7"]

    def report():
        file.write_text(json.dumps(grid.model_dump(mode="json")))
        result = CliRunner().invoke(app, ["ablation", "summary", *options])
        return Path(result.stdout.splitlines()[-1]).read_text(), result.stderr

    assert "left out" not in report()[0]
    grid.groups["vectors"].variants["h_2"]["urm.num_user_vectors"] = 32
    text, log = report()
    get_settings.cache_clear()
    assert "variant 'h_2' with seed 0 measured in" in log and "got a result of other settings" in log
    assert "Not measured with all seeds and the settings of the grid, and left out: h_2." in text
    assert "| h_2 |" not in text


def forget(tmp_path, run):
    (tmp_path / "runs" / run / "measure" / "result.json").unlink()


def test_a_curve_has_the_reference_at_its_own_number(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures.Axes, "errorbar", lambda self, x, y, **_: drawn.update(zip(x, y, strict=True)))
    columns = {"recall": [0.3, 0.1, 0.2], "difference": 0.0, "low": -0.1, "high": 0.1}
    table = pd.DataFrame(columns, index=[REFERENCE, "h_1", "h_2"])
    reference = {"urm": {"num_user_vectors": 8}}
    draw_group(tmp_path / "figure.png", GRID.groups["vectors"], table, reference, k=100)
    assert drawn == {1: 0.1, 2: 0.2, 8: 0.3}
