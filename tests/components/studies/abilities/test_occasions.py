import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from components.config import load_config
from components.exceptions import DataError
from components.flow import STUDIES
from components.schemas.events import ITEMS
from components.storage import run_stage
from components.studies.abilities import occasions
from components.studies.abilities.occasions import (
    Truth,
    bootstrap_auc,
    compare,
    options,
    run,
    table,
    weighted_auc,
)
from tests.worlds import CONFIGS
from tests.worlds.backbone import write_backbone
from tests.worlds.tables import event_row, item_row, put, write, write_days

SPLIT = {
    "train_start": "2017-02-01T05:00:00Z", "validation_start": "2017-05-01T05:00:00Z",
    "test_start": "2017-06-01T05:00:00Z", "end": "2017-07-01T05:00:00Z", "window_days": 7,
}  # fmt: skip
CALENDAR = """
zone: America/New_York
level: 3
window_days: 2
ordinary: an ordinary day
occasions:
  - {name: a picnic, day: 2017-02-10}
  - {name: a wedding, day: 2017-03-10}
  - {name: a birthday, day: 2017-04-10}
  - {name: a funeral, day: 2017-06-10}
templates: ["For {occasion}, people buy {category}", "People buy {category} for {occasion}"]
"""
LEAVES = ("wedding cake", "flowers", "ham", "milk", "bread", "cards")


def test_weighted_auc_is_that_of_the_repeated_rows():
    random = np.random.default_rng(0)
    scores, positive = random.integers(0, 5, 40).astype(float), random.random(40) < 0.3  # with ties
    weights = random.integers(0, 4, size=(3, 40)).astype(float)
    expected = [
        roc_auc_score(np.repeat(positive, row.astype(int)), np.repeat(scores, row.astype(int))) for row in weights
    ]
    np.testing.assert_allclose(weighted_auc(scores, positive, weights), expected)
    assert np.isnan(weighted_auc(scores, np.zeros(40, dtype=bool), weights)).all()


@pytest.fixture
def truth():
    """Eight occasions, one of which nothing is bought for, and a category that is judged for none of them."""
    lifted = np.random.default_rng(1).random((8, 60)) < 0.2
    lifted[3] = False
    judged = np.ones((8, 60), dtype=bool)
    judged[:, 0] = False
    return Truth(lifted, judged)


def test_the_mean_leaves_out_what_is_not_judged_and_what_nothing_is_bought_for(truth):
    scores = np.random.default_rng(2).normal(size=(8, 60)) + truth.lifted
    rows = [row for row in range(8) if row != 3]
    expected = np.mean([roc_auc_score(truth.lifted[row, 1:], scores[row, 1:]) for row in rows])
    spoilt = scores.copy()
    spoilt[3], spoilt[:, 0] = -scores[3], 99
    for some in (scores, spoilt):
        means = bootstrap_auc({"a": [some]}, truth, seed=0, draws=50)["a"]
        assert means[0] == pytest.approx(expected)
        assert (len(means), np.isfinite(means).all()) == (51, True)


def test_models_are_compared_on_the_same_draws(truth):
    random = np.random.default_rng(3)
    good = random.normal(size=(8, 60)) + 2 * truth.lifted
    worse = good + random.normal(size=(8, 60)) * 0.1
    chance = [random.normal(size=(8, 60)) for _ in range(3)]
    found = compare({"pretrained": [good], "worse": [worse], "random": chance}, truth, seed=0)
    assert found["auc"]["random"]["low"] < 0.5 < found["auc"]["random"]["high"]
    assert found["ahead"]["random"]["low"] > 0
    for name, row in found["ahead"].items():
        assert row["auc"] == pytest.approx(found["auc"]["pretrained"]["auc"] - found["auc"][name]["auc"])

    def width(row):
        return row["high"] - row["low"]

    assert width(found["ahead"]["worse"]) < width(found["auc"]["worse"]) / 2  # paired
    assert compare({"pretrained": [good]}, truth, seed=0)["auc"]["pretrained"] == found["auc"]["pretrained"]


@pytest.fixture
def world(tmp_path, settings, monkeypatch):
    """A log in which flowers are bought for the wedding and cards for the funeral; run directory and configuration."""
    monkeypatch.setattr(occasions, "MIN_EVENTS", 50)
    monkeypatch.setattr(occasions, "DRAWS", 100)
    monkeypatch.setattr(occasions, "MIN_LIFTED", 1)
    (settings.configs_dir / "occasions" / "complete_journey.yaml").write_text(CALENDAR)
    items = [item_row(number, category=["shop", "aisle", leaf]) for number, leaf in enumerate(LEAVES)]
    items.append(item_row(len(LEAVES), category=["shop", "aisle", "rarely bought"]))
    start = datetime(2017, 2, 1, 17, tzinfo=UTC)
    picnic, wedding, birthday, funeral = 9, 37, 68, 129  # days later
    sold = [(day, item) for day in range(140) for item in range(len(LEAVES))] + [(3, len(LEAVES))]
    wanted = {(picnic, 2), (wedding, 0), (wedding, 1), (birthday, 3), (funeral, 5)}
    sold += [pair for pair in sorted(wanted) for _ in range(60)]
    events = [event_row(number, item, start + timedelta(days=day)) for number, (day, item) in enumerate(sold)]
    folder = tmp_path / "files"
    put(tmp_path / "run", "validate", {
        "events": write_days(folder / "events", events), "items": write(folder / "items.parquet", ITEMS, items),
    })  # fmt: skip
    backbone = str(write_backbone(folder / "backbone", num_layers=2))
    config = load_config(
        CONFIGS / "complete_journey.yaml", {"urm.backbone": backbone, "urm.num_layers": 1, "features.split": SPLIT}
    )
    return tmp_path / "run", config


def test_every_model_scores_the_occasions_that_served_no_choice(world, settings):
    run_dir, config = world
    given = {"config": config, "settings": settings, "options": options(settings, config)}
    result = run_stage(STUDIES["occasions"], run, run_dir=str(run_dir), **given, force=True)
    metrics = result.metrics
    assert [row["name"] for row in metrics["occasions"]] == ["a wedding", "a funeral"]
    assert [row["in_test_split"] for row in metrics["occasions"]] == [False, True]
    # Flowers; the wedding cake shares the occasion's word, and what is rarely bought is no category of the study.
    assert [(row["lifted"], row["judged"]) for row in metrics["occasions"]] == [(1, 5), (1, 6)]
    controls = {"mean lift of the choice", "pretrained: another occasion"}
    models = {"pretrained", "text encoder", "random weights", "random weights: own method"} | controls
    assert set(metrics["auc"]) == models
    assert set(metrics["ahead"]) == models - {"pretrained"}
    assert metrics["readings"]["without the test weeks"]["auc"]["pretrained"]["auc"] == pytest.approx(
        metrics["occasions"][0]["auc"]["pretrained"]
    )
    assert metrics["chosen_on"] == ["a picnic", "a birthday"]
    chosen = metrics["chosen"]["pretrained"]
    assert chosen["auc"] == max(chosen["best_of_template"].values()) >= chosen["median"]
    assert json.loads(Path(result.outputs["occasions"]).read_text()) == metrics
    scores = pd.read_parquet(result.outputs["scores"])
    flowers = scores[(scores["occasion"] == "a wedding") & (scores["category"] == "shop > aisle > flowers")].iloc[0]
    # The window has two days and 132 events; on 114 ordinary days every one of six categories is bought once.
    assert flowers["lift"] == pytest.approx((62 + 10) / (132 * 114 / (6 * 114 + 1) + 10))
    logged = mlflow.search_runs(search_all_experiments=True, filter_string="tags.`urm.stage` = 'occasions'")
    assert logged["metrics.auc.pretrained"].iloc[0] == pytest.approx(metrics["auc"]["pretrained"]["auc"])
    assert table(metrics).row_count == 4


def test_one_occasion_of_the_test_weeks_is_scored_without_what_needs_others(world, settings):
    """Nothing is bought for the wedding any more, so that the funeral is all that is left."""
    run_dir, config = world
    file = settings.configs_dir / "occasions" / "complete_journey.yaml"
    file.write_text(CALENDAR.replace("day: 2017-03-10", "day: 2017-03-20"))
    result = run_stage(STUDIES["occasions"], run, run_dir=str(run_dir), config=config, settings=settings, force=True)
    metrics = result.metrics
    assert [(row["name"], row["in_test_split"]) for row in metrics["occasions"]] == [("a funeral", True)]
    assert "mean lift of the choice" in metrics["auc"] and "pretrained: another occasion" not in metrics["auc"]
    assert set(metrics["readings"]) == {"lift of at least 2", "lift over the season"}
    assert table(metrics).row_count == 3


def test_occasions_that_nothing_is_bought_for(world, settings, monkeypatch):
    run_dir, config = world
    monkeypatch.setattr(occasions, "MIN_LIFTED", 2)
    with pytest.raises(DataError, match=r"at least 2 categories .* got 0 for the choice, 0 for the report"):
        run_stage(STUDIES["occasions"], run, run_dir=str(run_dir), config=config, settings=settings, force=True)


def test_another_calendar_is_another_result(settings):
    config = load_config(CONFIGS / "complete_journey.yaml")
    before = options(settings, config)
    (settings.configs_dir / "occasions" / "complete_journey.yaml").write_text(CALENDAR)
    assert options(settings, config) != before
