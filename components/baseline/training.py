"""Training of the target-attention network; the weights of the best validation recall over the full catalogue count."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from components.baseline.batches import Batcher
from components.baseline.data import Dataset, Ints
from components.baseline.loss import NegativeSampler
from components.baseline.network import TargetAttention
from components.baseline.ranking import mean_recall, rank
from components.baseline.target_attention import TargetAttentionScorer, training_loss
from components.config import BaselineConfig
from components.exceptions import ConfigError

WARM_UP_STEPS = 20
FINAL_RATE = 0.02  # share of the learning rate left at the end of the linear decay
LOG_STEPS = 10
CLOCK_STEPS = 50
EVALUATIONS_PER_EPOCH = 2
MIN_EVAL_STEPS = 20  # on little data an epoch is a few steps, and evaluating would take longer than training

LogFunction = Callable[[int, dict[str, float]], None]


@dataclass
class TrainingSummary:
    """What happened."""

    steps: int = 0  # optimiser steps made
    examples: int = 0  # examples seen, repeats counted
    seconds: float = 0.0  # wall time of the steps; evaluations are not in it
    best_step: int = 0  # step whose weights were kept
    # validation recall per task, and "mean" over them, at that step
    best_recall: dict[str, float] = field(default_factory=lambda: {"mean": -1.0})
    # validation recall per task by a calibration that other examples chose (calibration.py), where there was one
    calibrated_recall: dict[str, float] = field(default_factory=dict)
    stopped_by: str = "epochs"  # epochs | time


def train(
    network: TargetAttention, batcher: Batcher, config: BaselineConfig, *, k: int, seed: int, log: LogFunction
) -> TrainingSummary:
    """Train in place; the network ends with the weights of the best validation recall@k.

    The learning rate falls linearly with whichever runs out first, epochs or seconds, so that a run cut short by the
    clock still ends on a small rate. Equal seeds (of batches and negatives) give equal weights only where the clock
    does not run ahead. `log` is called with (step, metrics) now and then.

    Raises:
        ConfigError: The weights are not finite in any evaluation.
    """
    data, trainer = batcher.data, _Trainer(network, batcher, config, seed)
    rows = data.examples.rows("train")
    steps_per_epoch = -(-len(rows) // config.batch_size)
    num_steps = steps_per_epoch * config.max_epochs
    eval_steps = max(MIN_EVAL_STEPS, -(-steps_per_epoch // EVALUATIONS_PER_EPOCH))
    best = BestWeights(network, "baseline.learning_rate")
    summary, started = trainer.summary, time.monotonic()

    for batch_rows in shuffle_batches(data, rows, config, seed):
        trainer.step(batch_rows, progress=max(summary.steps / num_steps, elapsed_share(started, config.max_seconds)))
        if summary.steps % LOG_STEPS == 0:
            log(summary.steps, trainer.latest())
        out_of_time = time.monotonic() - started >= config.max_seconds
        if summary.steps % eval_steps == 0 or summary.steps == num_steps or out_of_time:
            recall = validation_recall(network, batcher, k)
            recalls = {f"validation_recall.{name}": value for name, value in recall.items()}
            log(summary.steps, trainer.latest() | recalls)
            best.note(summary, recall)
        if out_of_time:
            summary.stopped_by = "time"
            break
    best.restore()
    return summary


def shuffle_batches(data: Dataset, rows: Ints, config: BaselineConfig, seed: int) -> Iterator[Ints]:
    """Rows of examples by batches, epoch after epoch; contexts are shuffled, the examples of one stay together.

    All tasks of a context share its attention, which is what costs.
    """
    random = np.random.default_rng(seed)
    _, ordinal = np.unique(data.examples.contexts[rows], return_inverse=True)
    for _ in range(config.max_epochs):
        place = random.permutation(int(ordinal.max()) + 1)
        shuffled = rows[np.argsort(place[ordinal], kind="stable")]
        for start in range(0, len(shuffled), config.batch_size):
            yield shuffled[start : start + config.batch_size]


def elapsed_share(started: float, max_seconds: float) -> float:
    """Share of the time limit that is over, in whole steps: it changes nothing while the epochs are ahead of it."""
    return int((time.monotonic() - started) / max_seconds * CLOCK_STEPS) / CLOCK_STEPS


def validation_recall(network: TargetAttention, batcher: Batcher, k: int) -> dict[str, float]:
    """Recall@k per task over the full catalogue, and its mean; leaves the network in training mode."""
    ranking = rank(TargetAttentionScorer(network, batcher), batcher.data, batcher.data.examples.rows("validation"), k)
    network.train()
    return mean_recall(ranking, batcher.data, k)


class _Trainer:
    """Makes optimiser steps and counts them."""

    def __init__(self, network: TargetAttention, batcher: Batcher, config: BaselineConfig, seed: int) -> None:
        self.network = network
        self.batcher = batcher
        train_events = batcher.data.items.train_events
        self.sampler = NegativeSampler(train_events, config.negative_power, config.num_negatives, seed)
        self.optimizer = torch.optim.AdamW(_groups(network, config.weight_decay), lr=config.learning_rate, fused=True)
        self.peak_rate = config.learning_rate
        self.summary = TrainingSummary()
        self.losses: deque[float] = deque(maxlen=LOG_STEPS)

    def step(self, rows: Ints, progress: float) -> None:
        """One batch; `progress` is the share of the training that is over."""
        started = time.monotonic()
        for group in self.optimizer.param_groups:
            warm_up = min(1.0, (self.summary.steps + 1) / WARM_UP_STEPS)
            group["lr"] = self.peak_rate * warm_up * max(FINAL_RATE, 1 - progress)
        loss = training_loss(self.network, self.batcher.training(rows), self.sampler)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.optimizer.step()
        self.losses.append(loss.item())
        self.summary.steps += 1
        self.summary.examples += len(rows)
        self.summary.seconds += time.monotonic() - started

    def latest(self) -> dict[str, float]:
        """Mean loss of the last steps, and the speed so far."""
        speed = self.summary.examples / self.summary.seconds
        return {"loss": float(np.mean(self.losses)), "examples_per_second": speed}


class BestWeights:
    """Keeps the weights of the best validation recall, finite ones only; `rate_field` is the learning rate's key.

    There is no early stopping: much of the gain comes at the end, with the falling rate.
    """

    def __init__(self, network: nn.Module, rate_field: str) -> None:
        self.network = network
        self.rate_field = rate_field
        self.weights: dict[str, torch.Tensor] = {}

    def note(self, summary: TrainingSummary, recall: dict[str, float]) -> None:
        """Keep the weights, and the recall in the summary, if it is the best one and they are finite."""
        if recall["mean"] > summary.best_recall["mean"] and self._finite():
            summary.best_recall, summary.best_step = recall, summary.steps
            self.weights = {name: value.clone() for name, value in self.network.state_dict().items()}

    def restore(self) -> None:
        """Put the best weights back.

        Raises:
            ConfigError: None were kept, and those of now are not finite.
        """
        if self.weights:
            self.network.load_state_dict(self.weights)
        elif not self._finite():
            raise ConfigError(
                f"training with field {self.rate_field!r}",
                expected="finite weights in some evaluation",
                got="NaN or infinite ones in all",
                remedy="lower the rate",
            )

    def _finite(self) -> bool:
        return all(bool(torch.isfinite(value).all()) for value in self.network.state_dict().values())


def _groups(network: TargetAttention, weight_decay: float) -> list[dict[str, object]]:
    """Weight decay for embeddings and linear maps, none for vectors and for what enters the score directly."""
    named = dict(network.named_parameters())
    decayed = {name for name, weight in named.items() if weight.ndim > 1 and not name.endswith("_to_score")}
    return [
        {"params": [named[name] for name in named if name in decayed], "weight_decay": weight_decay},
        {"params": [named[name] for name in named if name not in decayed], "weight_decay": 0.0},
    ]
