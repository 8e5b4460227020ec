"""Recall of rules: as the stage `baseline` has it, and without any training."""

import json
from pathlib import Path

import pytest

from benchmarks import rules
from components.baseline.data import load_dataset
from components.baseline.models import Fitter, ItemTables
from components.baseline.ranking import mean_recall, rank
from components.studies.finished import FinishedRun
from tests.worlds import make_settings
from tests.worlds.baseline import *  # noqa: F403  # fixtures
from tests.worlds.baseline import finish_stages


def test_rules_are_measured_on_the_split_and_nothing_is_trained(world, tmp_path: Path, monkeypatch) -> None:
    finish_stages(world, tmp_path / "run")
    run = FinishedRun(str(tmp_path / "run"), make_settings(tmp_path / "home"))
    models = {"models": ("category_rule", "bm25f", "sasrec", "target_attention_text")}
    config = world.config.model_copy(update={"baseline": world.config.baseline.model_copy(update=models)})
    for trained in ("_target_attention", "_sasrec"):
        monkeypatch.setattr(Fitter, trained, lambda *_: pytest.fail("a network was trained"))
    monkeypatch.setattr(rules, "find_run", lambda *_: (config, run))
    found = {}
    for split in ("validation", "test"):
        rules.main(["--split", split, "--output", str(tmp_path / "rules.json")])
        figures = json.loads((tmp_path / "rules.json").read_text())
        assert (figures["split"], figures["k"]) == (split, config.evaluation.k)
        found[split] = figures["recall"]
    assert set(found["test"]) == {"category_rule", "bm25f"}
    tables = ItemTables(world.folder / "item_table", world.folder / "item_table_past")
    files = [world.folder / f"{name}.parquet" for name in ("catalogue", "items", "contexts", "examples")]
    catalogue, items, contexts, examples = files
    data = load_dataset(catalogue, items, tables.now, contexts, examples, config.tasks)
    fitted = {model.name: model for model in rules.fit_rules(data, config, run, tables, tmp_path)}
    assert set(fitted) == {"popularity", "own_history", "item_knn", *found["test"]}
    best = fitted["category_rule"].trials["category_rule"][0]["validation_recall"]
    assert found["validation"]["category_rule"]["mean"] == pytest.approx(best)
    asked = rank(fitted["bm25f"].scorer, data, data.examples.rows("test"), config.evaluation.k)
    assert found["test"]["bm25f"] == pytest.approx(mean_recall(asked, data, config.evaluation.k))
    assert found["test"] != found["validation"]
    assert found["test"]["category_rule"]["text_query"] > found["test"]["bm25f"]["text_query"]
