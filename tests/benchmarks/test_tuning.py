import json
from pathlib import Path

import pytest

from benchmarks.tuning import SPACES, draw_settings, name_data, open_trainer, search, with_settings
from components.exceptions import DataError
from components.studies.finished import FinishedRun
from tests.worlds import make_settings
from tests.worlds.baseline import *  # noqa: F403  # fixtures
from tests.worlds.tables import put

SEED = 3  # of it, trial 1 has an MLP for texts
TABLES = {
    "validate": {"items": "items.parquet"},
    "features": {name: f"{name}.parquet" for name in ("catalogue", "contexts", "examples")},
    "encode": {name: name for name in ("item_table", "item_table_past")},
}


@pytest.fixture
def run(world, tmp_path: Path) -> FinishedRun:
    """A run that has features and vectors, and no baseline yet."""
    for stage, names in TABLES.items():
        put(tmp_path / "run", stage, {name: world.folder / path for name, path in names.items()})
    return FinishedRun(str(tmp_path / "run"), make_settings(tmp_path / "home"))


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("model", ["target_attention_text", "sasrec"])
def test_a_stopped_search_repeats_no_trial(model, run, config, tmp_path):
    output, asked = tmp_path / "out" / "tuning.jsonl", []
    train = open_trainer(model, config, run, run.settings)

    def count(trial):
        asked.append(trial)
        return train(trial)

    def go_on(num_trials):
        asked.clear()
        return search(model, config, count, output, data={}, seed=SEED, num_trials=num_trials, seconds=1.5)

    go_on(2)
    first = output.read_text()
    output.write_text(first[:-20])  # killed while it wrote
    go_on(2)
    assert [trial.baseline for trial in asked] == [
        with_settings(config, read(output)[1]["settings"], model, 1.5).baseline
    ]
    trials = go_on(3)
    assert len(asked) == 1
    lines = read(output)
    assert lines[0] == json.loads(first.splitlines()[0])
    assert [line["trial"] for line in lines] == [0, 1, 2]
    assert lines[0]["settings"] == {}
    for line in lines:
        assert line["settings"] == draw_settings(SPACES[model], SEED, line["trial"])
        assert set(line["validation_recall"]) == {"next_purchase", "new_item", "text_query", "mean"}
        assert line["steps"] > 0 < line["seconds"]
        assert line["stopped_by"] in ("epochs", "time")
    assert trials[0]["validation_recall"]["mean"] == max(line["validation_recall"]["mean"] for line in lines)
    with pytest.raises(DataError, match=r"expected trials of one search, seed 5, got 3"):
        search(model, config, train, output, data={}, seed=5, num_trials=3, seconds=1.5)


def test_trials_of_other_data_or_of_another_seed_of_the_run_are_not_mixed(run, config, tmp_path):
    output, train = tmp_path / "tuning.jsonl", open_trainer("target_attention", config, run, run.settings)

    def go_on(of_run, seed=0):
        data = name_data(of_run, config.model_copy(update={"seed": seed}))
        return search("target_attention", config, train, output, data=data, seed=SEED, num_trials=1, seconds=1.5)

    assert go_on(run) == go_on(run) == read(output)
    with pytest.raises(DataError, match=r"trials of one search, run_seed 1, got 0"):
        go_on(run, seed=1)
    for stage in ("features", "encode"):
        put(tmp_path / "other", stage, fingerprint=f"another {stage}")
    with pytest.raises(DataError, match=r"data .*another features.*, got .*'features': 'features'"):
        go_on(FinishedRun(str(tmp_path / "other"), run.settings))
    assert len(read(output)) == 1


def test_the_first_drawn_trial_reads_texts_by_an_mlp():
    settings = draw_settings(SPACES["target_attention_text"], SEED, 1)
    assert settings["text_hidden"]


@pytest.mark.parametrize("model", SPACES)
def test_every_value_of_a_space_is_valid(model, config):
    for name, values in SPACES[model].items():
        for value in values:
            changed = with_settings(config, {name: value}, model, 7.0).baseline
            of_model = changed.sasrec if model == "sasrec" else changed
            assert getattr(of_model, name.removeprefix("sasrec.")) == value
            assert of_model.max_seconds == 7.0


def test_the_best_of_a_search_are_trained_for_longer(run, config, tmp_path):
    short, long = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    train = open_trainer("target_attention", config, run, run.settings)
    trials = search("target_attention", config, train, short, data={}, seed=SEED, num_trials=3, seconds=60, epochs=1)
    search(
        "target_attention", config, train, long, data={}, seed=SEED, num_trials=2, seconds=90, epochs=2, best_of=short
    )
    assert {line["trial"]: line["settings"] for line in read(long)} == {
        trial["trial"]: trial["settings"] for trial in trials[:2]
    }
    steps = {line["trial"]: line["steps"] for line in read(short)}
    assert all(line["steps"] == 2 * steps[line["trial"]] for line in read(long))
    with pytest.raises(DataError, match=r"seed 5, got 3"):
        search(
            "target_attention", config, train, long, data={}, seed=5, num_trials=2, seconds=90, epochs=2, best_of=short
        )
