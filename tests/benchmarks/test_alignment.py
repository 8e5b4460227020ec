"""Item tokens and titles: what is learned, what stays as it was, and that a stopped benchmark goes on."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.alignment import ALIGNED, ITEMS_PER_STEP, LEARNED, PLAIN, Alignment, Inputs, Titles, main, train_one
from components.caches import CachePlace
from components.exceptions import DataError
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.events import ITEMS
from components.studies.finished import FinishedRun
from components.urm.network.build import build_model
from components.urm.training.checkpoints import Checkpoints
from components.urm.training.session import prepare
from tests.worlds import make_settings
from tests.worlds.tables import item_row, put, write
from tests.worlds.urm import *  # noqa: F403  # fixtures
from tests.worlds.urm import CATEGORIES

NUM_ITEMS = 120


def make_alignment(config, folder: Path, **changed) -> Alignment:
    """A model of items whose titles are in their text vectors."""
    item_ids, kind = np.arange(1, NUM_ITEMS + 1), np.arange(NUM_ITEMS) % len(CATEGORIES)
    everything, noise = np.ones(NUM_ITEMS, dtype=bool), np.random.default_rng(0).normal(size=(NUM_ITEMS, 12))
    vectors = {
        "text": (np.eye(12)[kind] * 3 + 0.1 * noise, everything),
        POPULARITY: (np.ones((NUM_ITEMS, 1)), everything),
    }
    write_item_table(folder / "table", item_ids, vectors)
    torch.manual_seed(0)
    urm = config.urm.model_copy(update=changed)
    new = build_model(urm, ItemTable.open(folder / "table"), ["purchase"], CachePlace(folder))
    titles = Titles(item_ids, [CATEGORIES[number] for number in kind], 30)
    return Alignment(new.model, new.builder, titles, urm.combine, finds=not urm.copy_path)


def test_the_tokens_of_items_that_were_held_out_tell_their_titles(config, tmp_path: Path) -> None:
    alignment = make_alignment(config, tmp_path)
    weights = {name: weight.detach().clone() for name, weight in alignment.model.named_parameters()}
    before = alignment.measure()
    assert before["own_token"] == pytest.approx(before["other_token"], abs=0.05)
    alignment.learn(150, seed=0)
    after = alignment.measure()
    assert after["own_token"] < before["own_token"]
    assert after["own_token"] < after["other_token"] - 0.2
    changed = {
        name for name, weight in alignment.model.named_parameters() if not torch.equal(weight.detach(), weights[name])
    }
    assert changed
    assert all(name.startswith(LEARNED[0]) for name in changed)  # beside copies W h stays zero
    assert all(weight.requires_grad for weight in alignment.model.parameters())
    assert alignment.model.training


def test_without_copies_titles_find_their_items(config, tmp_path: Path) -> None:
    alignment = make_alignment(config, tmp_path, copy_path=False)
    before = alignment.measure()["found_at_10"]
    alignment.learn(150, seed=0)
    # Of 40 items with this title ten are found: a quarter, where nothing known finds a twelfth.
    assert before < 0.15
    assert alignment.measure()["found_at_10"] > 0.18


def test_each_item_is_learned_once_before_any_comes_again_and_none_that_is_held_out() -> None:
    titles = Titles(np.arange(100), [str(number) for number in range(100)], 100 - 3 * ITEMS_PER_STEP)
    steps = [places.tolist() for places in titles.steps(6, seed=0)]
    for epoch in (steps[:3], steps[3:]):
        assert sorted(place for places in epoch for place in places) == list(range(titles.num_held_out, 100))
    assert steps[:3] != steps[3:]
    assert steps == [places.tolist() for places in titles.steps(6, seed=0)]


def test_titles_are_those_of_the_items_asked_for_and_not_long(tmp_path: Path) -> None:
    rows = [item_row(number, title=title) for number, title in ((3, "soap " * 40), (1, "oil"), (2, ""), (4, "wax"))]
    titles = Titles.read(write(tmp_path / "items.parquet", ITEMS, rows), np.array([1, 2, 3]), seed=0)
    assert dict(zip(titles.item_ids.tolist(), titles.titles, strict=True)) == {1: "oil", 3: " ".join(["soap"] * 12)}


@pytest.fixture
def run(tables, table_dir: Path, tmp_path: Path) -> FinishedRun:
    """The stages up to encode of this tiny world."""
    files = tmp_path / "files"
    for name in ("catalogue", "contexts", "examples"):
        files.mkdir(exist_ok=True)
        pq.write_table(getattr(tables, name), files / f"{name}.parquet")
    titles = [CATEGORIES[number % 3] for number in range(len(tables.item_ids))]
    rows = [item_row(int(item), title=title) for item, title in zip(tables.item_ids, titles, strict=True)]
    write(files / "items.parquet", ITEMS, rows)
    features = {name: files / f"{name}.parquet" for name in ("catalogue", "contexts", "examples")}
    outputs = {
        "validate": {"items": files / "items.parquet"},
        "features": features | {"recent_examples": features["examples"]},
        "encode": {name: table_dir for name in ("item_table", "item_table_past")},
    }
    for stage, paths in outputs.items():
        put(tmp_path / "run", stage, paths)
    return FinishedRun(str(tmp_path / "run"), make_settings(tmp_path / "home"))


def test_both_models_are_asked_the_same_and_a_stopped_benchmark_goes_on(
    config, run: FinishedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, output = tmp_path / "tiny.yaml", tmp_path / "alignment.json"
    file.write_text(json.dumps(config.model_dump(mode="json", exclude_none=True)))
    monkeypatch.setattr("benchmarks.alignment.get_settings", lambda: run.settings)
    words = ["--config", str(file), "--run-dir", run.run_dir, "--steps", "10", "--output", str(output)]
    main(words)
    first, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert "aligning" in run_steps(printed) and "training" in run_steps(printed)
    assert first[PLAIN]["recall"]["mean"]["difference"] == 0
    gain = first[ALIGNED]["recall"]["mean"]["recall"] - first[PLAIN]["recall"]["mean"]["recall"]
    assert first[ALIGNED]["recall"]["mean"]["difference"] == pytest.approx(gain)
    assert set(first[ALIGNED]["held_out"]) == {"before", "after"}
    assert first[ALIGNED]["held_out"]["before"] != first[ALIGNED]["held_out"]["after"]

    main(words)
    assert not {"aligning", "training"} & run_steps(capsys.readouterr().out)
    again = json.loads(output.read_text())
    for name in (PLAIN, ALIGNED):
        assert again[name]["recall"] == first[name]["recall"]
    assert again[ALIGNED]["held_out"] == first[ALIGNED]["held_out"]
    assert (again["steps"], again["run_seed"]) == (10, config.seed)

    for changed in (["--steps", "20"], ["--set", "seed=5"], ["--set", "urm.learning_rate=0.000001"]):
        with pytest.raises(DataError, match=r"expected models of these settings and data, got others"):
            main([*words, *changed])


def run_steps(printed: str) -> set[str]:
    """First words of the lines of a benchmark."""
    return {line.split()[0] for line in printed.splitlines() if line}


def test_without_alignment_a_model_is_that_of_the_training(config, run: FinishedRun, tmp_path: Path) -> None:
    inputs = Inputs.read(config, run, tmp_path / "mapped")
    recalls, _ = train_one(config, run, inputs, tmp_path / "plain", 0)
    torch.manual_seed(config.seed)
    session = prepare(
        config, inputs.table, inputs.training_table, pq.read_table(inputs.catalogue), inputs.training,
        inputs.validation, cache=CachePlace.of(run.settings), device="cpu",
    )  # fmt: skip
    session.train(Checkpoints(tmp_path / "again"), lambda *_: None)
    expected = session.validation.measure(session.new.model)
    assert dict(recalls.groupby("task")["recall"].mean()) == pytest.approx(
        {task: recall for task, recall in expected.items() if task != "mean"}
    )
