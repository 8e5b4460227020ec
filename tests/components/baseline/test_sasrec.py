"""SASRec: its sequences, its causal mask, its scores, and that it learns an order."""

import numpy as np
import pytest
import torch

from components.baseline.data import Dataset
from components.baseline.ranking import mean_recall, rank
from components.baseline.sasrec import SasRec, SasRecScorer, Sequences, _pad, train_sasrec, training_sequences
from components.config import RunConfig, SasRecConfig
from components.exceptions import ConfigError
from tests.worlds.baseline import history_of, targets_of

SMALL = SasRecConfig(dimension=16, num_layers=1, dropout=0)


def test_sequences_are_the_newest_training_context_and_then_its_targets(data: Dataset) -> None:
    sequences, contexts, examples = training_sequences(data), data.contexts, data.examples
    train = examples.rows("train")
    asked = sorted(set(examples.contexts[train].tolist()))
    newest = {int(contexts.users[context]): context for context in asked}  # the last one wins: contexts go by cut
    assert len(sequences.offsets) == len(newest) + 1
    got = {tuple(sequences.items[a:b].tolist()) for a, b in zip(sequences.offsets, sequences.offsets[1:], strict=False)}
    expected = set()
    for context in newest.values():
        history = contexts.items[contexts.offsets[context] : contexts.offsets[context + 1]][::-1].tolist()
        rows = [row for row in train if examples.contexts[row] == context]
        targets = {item for row in rows for item in targets_of(data, row)}
        expected.add((*history, *sorted(targets)))
    assert got == expected


def test_padding_keeps_the_newest_and_stands_at_the_end() -> None:
    items, mask = _pad(Sequences(np.array([1, 2, 3, 4, 5]), np.array([0, 3, 3, 5])), np.array([0, 1, 2]), 2)
    assert items.tolist() == [[2, 3], [0, 0], [4, 5]]
    assert mask.tolist() == [[True, True], [False, False], [True, True]]


def test_a_step_sees_nothing_after_it() -> None:
    torch.manual_seed(0)
    model = SasRec(20, 6, SMALL).eval()
    items = torch.tensor([[3, 1, 4, 1, 5]])
    changed = torch.tensor([[3, 1, 4, 9, 2]])
    assert torch.allclose(model(items)[:, :3], model(changed)[:, :3], atol=1e-6)
    assert not torch.allclose(model(items)[:, 3], model(changed)[:, 3], atol=1e-3)


def test_scores_are_those_of_one_history_at_a_time(data: Dataset) -> None:
    torch.manual_seed(0)
    model = SasRec(len(data.items), 10, SMALL).eval()
    rows = data.examples.rows("test")[:7]
    scores = SasRecScorer(model, data).score(rows)
    for row, got in zip(rows, scores, strict=True):
        history = torch.from_numpy(data.contexts.items[history_of(data, row)][:10][::-1].copy())
        with torch.no_grad():
            expected = model(history.unsqueeze(0))[0, -1] @ model.items.weight.T
        assert torch.allclose(got, expected, atol=1e-4)


@pytest.mark.parametrize("num_negatives", [0, 256])
def test_learns_with_the_full_and_with_a_sampled_softmax(data: Dataset, config: RunConfig, num_negatives: int) -> None:
    settings = {"num_negatives": num_negatives, "max_epochs": 40, "learning_rate": 1e-2}
    baseline = config.baseline.model_copy(update={"sasrec": config.baseline.sasrec.model_copy(update=settings)})
    torch.manual_seed(0)
    model, summary = train_sasrec(data, baseline, k=20, seed=0, log=lambda step, metrics: None)
    untrained = SasRec(len(data.items), baseline.history_length, baseline.sasrec)
    rows = data.examples.rows("validation")
    before = mean_recall(rank(SasRecScorer(untrained, data), data, rows, 20), data, 20)["mean"]
    after = mean_recall(rank(SasRecScorer(model, data), data, rows, 20), data, 20)
    assert after == pytest.approx(summary.best_recall)
    assert after["mean"] > 2 * before
    assert summary.stopped_by in {"epochs", "time"}


def test_weights_that_are_not_finite_are_no_rival(data: Dataset, config: RunConfig) -> None:
    settings = SMALL.model_copy(update={"learning_rate": 1e38})
    baseline = config.baseline.model_copy(update={"sasrec": settings})
    with pytest.raises(ConfigError, match=r"field 'baseline\.sasrec\.learning_rate': expected finite weights"):
        train_sasrec(data, baseline, k=20, seed=0, log=lambda step, metrics: None)
