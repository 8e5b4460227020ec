"""Training improves recall, keeps the best weights, and stops for the right reason."""

from collections.abc import Iterator

import pytest
import torch

import components.baseline.training as training
from components.baseline.batches import Batcher
from components.baseline.data import Dataset
from components.baseline.network import TargetAttention
from components.baseline.target_attention import build_network
from components.baseline.training import TrainingSummary, train, validation_recall
from components.config import RunConfig
from components.exceptions import ConfigError


def run(
    data: Dataset, config: RunConfig, **changes: float
) -> tuple[TargetAttention, TrainingSummary, list[tuple[int, dict[str, float]]]]:
    torch.manual_seed(0)
    baseline = config.baseline.model_copy(update=changes)
    network, logged = build_network(data, baseline), []
    batcher = Batcher(data, baseline.history_length)
    summary = train(network, batcher, baseline, k=20, seed=0, log=lambda *entry: logged.append(entry))
    return network, summary, logged


def test_learns_and_ends_with_the_best_weights(data: Dataset, config: RunConfig) -> None:
    network, summary, logged = run(data, config, max_epochs=16)
    recalls = [metrics["validation_recall.mean"] for _, metrics in logged if "validation_recall.mean" in metrics]
    losses = [metrics["loss"] for _, metrics in logged]
    assert losses[-1] < losses[0] - 0.3
    assert summary.stopped_by == "epochs"
    assert summary.best_recall["mean"] == max(recalls)
    assert validation_recall(network, Batcher(data, 30), 20) == pytest.approx(summary.best_recall)
    assert summary.examples == 16 * len(data.examples.rows("train"))


def test_learns_what_only_training_can_tell(data: Dataset, config: RunConfig) -> None:
    """A query asks for one category: nothing but training links its words to items."""
    torch.manual_seed(0)
    untrained = build_network(data, config.baseline)
    before = validation_recall(untrained, Batcher(data, 30), 20)["text_query"]
    _, _, logged = run(data, config, max_epochs=40)
    after = max(metrics.get("validation_recall.text_query", 0.0) for _, metrics in logged)
    assert after > before + 0.1


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads add gradients in an order of their own, which changes last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_equal_seeds_give_equal_weights(data: Dataset, config: RunConfig) -> None:
    first, second = run(data, config)[0], run(data, config)[0]
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_weight_decay_shrinks_matrices_and_not_what_enters_the_score(data: Dataset, config: RunConfig) -> None:
    plain, decayed = (run(data, config, weight_decay=decay)[0].state_dict() for decay in (0.0, 30.0))
    assert decayed["identity.weight"].norm() < 0.5 * plain["identity.weight"].norm()
    assert decayed["match_to_score"].norm() > 0.8 * plain["match_to_score"].norm()


def test_goes_on_without_gain_and_ends_with_the_best_weights(
    data: Dataset, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What comes last, when the learning rate has fallen, is often the best."""
    recalls = [0.3, 0.4, 0.35, 0.4, 0.3, 0.2, 0.1, 0.2]
    weights: list[dict[str, torch.Tensor]] = []

    def measure(network: torch.nn.Module, *_: object) -> dict[str, float]:
        weights.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"mean": recalls[(len(weights) - 1) % len(recalls)]}

    monkeypatch.setattr(training, "validation_recall", measure)
    network, summary, _ = run(data, config, max_epochs=40)
    assert len(weights) >= len(recalls)
    assert summary.stopped_by == "epochs"
    assert summary.best_recall == {"mean": 0.4}
    kept = network.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in weights[1].items())
    assert not all(torch.equal(kept[name], value) for name, value in weights[-1].items())


def test_stops_when_the_time_is_over(data: Dataset, config: RunConfig) -> None:
    _, summary, _ = run(data, config, max_seconds=1e-6)
    assert (summary.stopped_by, summary.steps) == ("time", 1)
    assert summary.best_step == 1


def test_weights_that_are_not_finite_are_no_rival(data: Dataset, config: RunConfig) -> None:
    message = r"field 'baseline\.learning_rate': expected finite weights .* got NaN or infinite ones in all; lower the"
    with pytest.raises(ConfigError, match=message):
        run(data, config, max_epochs=16, learning_rate=1e3)


def test_a_training_that_ends_in_nan_keeps_its_good_weights(
    data: Dataset, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the second evaluation finds is better by chance."""
    evaluations = 0

    def measure(network: torch.nn.Module, *_: object) -> dict[str, float]:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 2:
            next(network.parameters()).data.fill_(torch.nan)
        return {"mean": 0.1 * evaluations}

    monkeypatch.setattr(training, "validation_recall", measure)
    network, summary, _ = run(data, config, max_epochs=40)
    assert evaluations > 2
    assert summary.best_recall == {"mean": 0.1}
    assert all(torch.isfinite(weight).all() for weight in network.parameters())
