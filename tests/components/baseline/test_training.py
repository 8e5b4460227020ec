"""Training improves recall, keeps the best weights, and stops for the right reason."""

import pytest
import torch

import components.baseline.training as training
from components.baseline.batches import Batcher
from components.baseline.data import Dataset
from components.baseline.network import TargetAttention
from components.baseline.rules import Popularity
from components.baseline.target_attention import build_network
from components.baseline.training import TrainingSummary, train, validation_recall
from components.config import RunConfig


def run(
    data: Dataset, config: RunConfig, **changes: float
) -> tuple[TargetAttention, TrainingSummary, list[tuple[int, dict[str, float]]]]:
    torch.manual_seed(0)
    baseline = config.baseline.model_copy(update=changes)
    network, logged = build_network(data, baseline, Popularity(data).counts), []
    summary = train(network, data, baseline, k=20, seed=0, log=lambda step, metrics: logged.append((step, metrics)))
    return network, summary, logged


def test_learns_and_ends_with_the_best_weights(data: Dataset, config: RunConfig) -> None:
    torch.manual_seed(0)
    untrained = build_network(data, config.baseline, Popularity(data).counts)
    before = validation_recall(untrained, Batcher(data, 30), 20)["mean"]
    network, summary, logged = run(data, config, max_epochs=8, patience=100)
    recalls = [metrics["validation_recall.mean"] for _, metrics in logged if "validation_recall.mean" in metrics]
    losses = [metrics["loss"] for _, metrics in logged if "loss" in metrics]
    assert losses[-1] < losses[0]
    assert summary.stopped_by == "epochs"
    assert summary.best_recall["mean"] == max(recalls) > before + 0.02
    assert validation_recall(network, Batcher(data, 30), 20) == pytest.approx(summary.best_recall)
    assert summary.examples == 8 * len(data.examples.rows("train"))


def test_equal_seeds_give_equal_weights(data: Dataset, config: RunConfig) -> None:
    first, second = run(data, config)[0], run(data, config)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_stops_when_validation_gains_no_more(data: Dataset, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    recalls = iter([0.3, 0.4, 0.35, 0.4, 0.9])
    monkeypatch.setattr(training, "validation_recall", lambda *_: {"mean": next(recalls)})
    _, summary, _ = run(data, config, max_epochs=10, patience=2)
    assert summary.stopped_by == "patience"
    assert summary.best_recall == {"mean": 0.4}
    assert summary.best_step < summary.steps


def test_stops_when_the_time_is_over(data: Dataset, config: RunConfig) -> None:
    _, summary, _ = run(data, config, max_seconds=1e-6)
    assert (summary.stopped_by, summary.steps) == ("time", 1)
    assert summary.best_step == 1
