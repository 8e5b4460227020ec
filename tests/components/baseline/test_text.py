"""Retrievers of texts: a query beats the history, and items without text are no candidates."""

import dataclasses

import numpy as np
import pytest
import torch

from components.baseline.batches import Batcher
from components.baseline.data import Dataset
from components.baseline.target_attention import (
    Frozen,
    TargetAttentionScorer,
    build_network,
    score_training_batch,
)
from components.baseline.text import TextFeatures, TextRetriever
from components.config import RunConfig
from tests.worlds.baseline import history_of, rows_with_query


def test_vectors_are_those_of_catalogue_and_queries(data: Dataset, text: TextFeatures) -> None:
    assert text.items.shape == (len(data.items), 384)
    assert text.queries.shape == (len(data.examples.queries), 384)
    assert text.present.all()
    assert np.linalg.norm(text.items, axis=1) == pytest.approx(np.ones(len(data.items)), abs=1e-2)


def test_a_query_is_compared_with_item_texts(data: Dataset, text: TextFeatures) -> None:
    rows = rows_with_query(data, wanted=True)
    scores = TextRetriever(data, text, 30.0).score(rows).numpy()
    for row, got in zip(rows, scores, strict=True):
        expected = text.items @ text.queries[data.examples.query[row]]
        assert got == pytest.approx(expected, abs=1e-3)
        query = data.examples.queries[data.examples.query[row]]
        assert query in data.items.titles[int(got.argmax())]


def test_without_a_query_the_history_is_asked(data: Dataset, text: TextFeatures) -> None:
    row = rows_with_query(data, wanted=False)[:1]
    part = history_of(data, row[0])
    weights = np.log1p(data.contexts.counts[part]) * 2 ** (-data.contexts.days[part] / 30)
    wanted = weights @ text.items[data.contexts.items[part]]
    expected = text.items @ (wanted / np.linalg.norm(wanted))
    assert TextRetriever(data, text, 30.0).score(row)[0].numpy() == pytest.approx(expected, abs=1e-4)


def test_items_without_text_are_no_candidates(data: Dataset, text: TextFeatures) -> None:
    present = text.present.copy()
    present[::3] = False
    scores = TextRetriever(data, dataclasses.replace(text, present=present), 30.0).score(data.examples.rows("test")[:3])
    assert torch.isinf(scores[:, ::3]).all()
    assert torch.isfinite(scores[:, 1::3]).all()


@pytest.mark.parametrize("text_hidden", [0, 24])
def test_text_of_items_and_query_moves_target_attention(
    data: Dataset, text: TextFeatures, config: RunConfig, text_hidden: int
) -> None:
    torch.manual_seed(0)
    settings = config.baseline.model_copy(update={"text_hidden": text_hidden})
    network = build_network(data, settings, Frozen(text.items))
    assert network.text_to_item(torch.zeros(1, 384)).shape == (1, config.baseline.dimension)
    assert ("text_to_item.2.weight" in network.state_dict()) == (text_hidden > 0)
    batcher = Batcher(data, 30, text.queries)
    rows = rows_with_query(data, wanted=True)
    scores = TargetAttentionScorer(network, batcher).score(rows)
    own, _ = score_training_batch(network, batcher.training(rows), torch.arange(len(data.items)))
    batch = batcher.training(rows)
    items = batch.own.items[batch.examples.contexts]
    real = items < len(data.items)
    expected = scores.gather(1, items.clamp(max=len(data.items) - 1))
    assert torch.allclose(own[real], expected[real], atol=1e-4)
    silent = TargetAttentionScorer(network, Batcher(data, 30, np.zeros_like(text.queries))).score(rows)
    assert not torch.allclose(scores, silent, atol=1e-3)
    assert "item_text" not in network.state_dict()  # frozen vectors stay in the item table
