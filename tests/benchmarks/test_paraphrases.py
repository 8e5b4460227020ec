"""Category queries in other words: how they are asked, and what is said of the answers."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from benchmarks import paraphrases
from benchmarks.paraphrases import (
    FORMS,
    NO_QUERY,
    OTHER_WORDS,
    OWN_WORDS,
    measure,
    nearest_by_items,
    read_phrases,
    summarise,
)
from components.baseline.text import TextFeatures
from components.exceptions import ConfigError
from components.studies.finished import FinishedRun
from tests.worlds import CONFIGS, make_settings
from tests.worlds.baseline import *  # noqa: F403  # fixtures
from tests.worlds.baseline import finish_stages

PHRASES = ("zzz qqq", "yyy")


@pytest.mark.parametrize("path", sorted((CONFIGS / "paraphrases").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_phrase_names_its_category(path: Path) -> None:
    assert all(read_phrases(path).values())


@pytest.mark.parametrize("phrase", ["a shampoo for me", "Two SHAMPOOS"])
def test_a_phrase_that_names_its_category_is_refused(phrase: str, tmp_path: Path) -> None:
    path = tmp_path / "phrases.yaml"
    path.write_text(f"shampoos: [{phrase}]\n")
    with pytest.raises(ConfigError, match=r"expected no word of 'shampoos', got shampoo; write it in other words"):
        read_phrases(path)


def test_a_rule_by_names_understands_them_alone(world, tmp_path: Path) -> None:
    finish_stages(world, tmp_path / "run")
    run = FinishedRun(str(tmp_path / "run"), make_settings(tmp_path / "home"))
    asked = pq.read_table(world.folder / "examples.parquet").to_pandas()
    asked = asked[(asked["split"] == "validation") & (asked["task"] == "text_query")]
    category = asked["query"].value_counts().index[0]
    baseline = world.config.baseline.model_copy(update={"models": ("category_rule", "bm25f")})
    config = world.config.model_copy(update={"baseline": baseline})
    recalls = measure(config, run, {}, {category: PHRASES})
    assert set(recalls["category"]) == {category} and recalls["seen"].all()
    counts = recalls[recalls["model"] == "category_rule"]["form"].value_counts()
    num_asked = int((asked["query"] == category).sum())
    assert [counts[form] for form in FORMS] == [num_asked, num_asked, num_asked * len(PHRASES)]
    found = summarise(recalls, draws=10)
    assert set(found) == {"popularity", "own_history", "item_knn", "category_rule", "bm25f"}
    rule = found["category_rule"]["recall"]
    assert rule[OWN_WORDS] > max(rule[NO_QUERY], rule[OTHER_WORDS])
    assert found["bm25f"]["recall"][OTHER_WORDS] == 0  # words that no item has


def test_the_nearest_category_is_that_of_most_of_the_nearest_items(data, monkeypatch) -> None:
    monkeypatch.setattr(paraphrases, "NEAREST_ITEMS", 3)
    leaves = [path[-1] if path else "" for path in data.items.categories]
    names = sorted(name for name in set(leaves) if leaves.count(name) >= 2)
    chosen = {name: np.flatnonzero(np.array(leaves) == name)[:2] for name in names}
    stranger = {name: next(at for at, leaf in enumerate(leaves) if leaf not in ("", name)) for name in names}
    items = np.zeros((len(leaves), len(names)), np.float32)
    for axis, name in enumerate(names):
        items[stranger[name], axis] = 3  # the nearest of all, and alone
        items[chosen[name], axis] = 2
    text = TextFeatures(items=items, present=np.ones(len(leaves), bool), queries=np.eye(len(names), dtype=np.float32))
    assert len(names) > 1
    assert nearest_by_items(data, text) == names


def test_intervals_draw_categories() -> None:
    """Other words bring .5 in one category and nothing in the other: with two categories anything between may be."""
    rows = [
        {"model": "urm", "form": form, "category": category, "recall": recall}
        for category, other in (("a", 1.0), ("b", 0.5))
        for form, recall in ((NO_QUERY, 0.5), (OWN_WORDS, 0.75), (OTHER_WORDS, other))
        for _ in range(50)
    ]
    found = summarise(pd.DataFrame(rows))["urm"]
    assert found["recall"] == {NO_QUERY: 0.5, OWN_WORDS: 0.75, OTHER_WORDS: 0.75}
    assert found["gain_of_other_words"] == 0.25
    assert np.allclose(found["gain_interval"], [0.0, 0.5])
    assert found["interval"][OWN_WORDS] == [0.75, 0.75]
