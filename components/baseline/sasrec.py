"""Self-attentive sequential recommendation (SASRec, Kang & McAuley 2018): one causal pass trains all of a user's steps.

Notable against the paper: the loss is a softmax over the whole catalogue instead of one sampled negative per step (the
known reason for most of what later models gain over SASRec), or sampled with log-Q correction, which costs a tenth.
Blocks are pre-norm, and positions count from the oldest item, so that a step means the same in training and in recall.

The model knows neither task nor query: it gives every task of a context the same scores.

Letters: n catalogue, B users, L steps, P steps with a target, d width, m negatives.
"""

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from components.baseline.data import Dataset, Ints, gather
from components.baseline.loss import NegativeSampler
from components.baseline.ranking import mean_recall, rank
from components.baseline.training import (
    FINAL_RATE,
    MIN_EVAL_STEPS,
    BestWeights,
    LogFunction,
    TrainingSummary,
    elapsed_share,
)
from components.config import BaselineConfig, SasRecConfig

WARM_UP_STEPS = 100
LOG_STEPS = 50
BATCHES_PER_BUCKET = 50  # sequences of so many batches are sorted by length, so that little is padding

Loss = Callable[[Tensor, Tensor], Tensor]


class Sequences(NamedTuple):
    """Users' items, oldest first: sequence r is items[offsets[r]:offsets[r + 1]]."""

    items: Ints
    offsets: Ints


class SasRec(nn.Module):
    """Maps the items so far to a vector whose inner product with an item's vector is the score of coming next."""

    def __init__(self, num_items: int, length: int, config: SasRecConfig) -> None:
        super().__init__()
        self.length = length
        self.items = nn.Embedding(num_items, config.dimension)
        self.positions = nn.Embedding(length, config.dimension)
        for table in (self.items, self.positions):
            nn.init.normal_(table.weight, std=config.dimension**-0.5)
        self.dropout = nn.Dropout(config.dropout)
        block = nn.TransformerEncoderLayer(
            config.dimension,
            config.num_heads,
            dim_feedforward=config.dimension,
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            block, config.num_layers, norm=nn.LayerNorm(config.dimension), enable_nested_tensor=False
        )

    def forward(self, items: Tensor) -> Tensor:
        """User vectors after each step, [B, L, d], for items [B, L], oldest first; padding stands at the end."""
        steps = items.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(steps)
        hidden: Tensor = self.dropout(self.items(items) + self.positions.weight[:steps])
        return self.blocks(hidden, mask=mask, is_causal=True)  # type: ignore[no-any-return]  # torch says Any


class SasRecScorer:
    """Scores the full catalogue by the user vector after the newest history item; -inf for an empty history."""

    def __init__(self, model: SasRec, data: Dataset) -> None:
        self.model = model.eval()
        self.data = data

    @torch.no_grad()
    def score(self, rows: Ints) -> Tensor:
        """Scores of shape [len(rows), catalogue]."""
        contexts, position = np.unique(self.data.examples.contexts[rows], return_inverse=True)
        items, owner = gather(self.data.contexts.items, self.data.contexts.offsets, contexts)
        lengths = np.bincount(owner, minlength=len(contexts))
        history = Sequences(items[::-1], np.concatenate([[0], np.cumsum(lengths[::-1])]))  # newest first, reversed
        steps, _ = _pad(history, np.arange(len(contexts))[::-1], self.model.length)
        last = torch.from_numpy(np.clip(lengths, 1, self.model.length) - 1)
        users = self.model(steps)[torch.arange(len(contexts)), last]
        scores: Tensor = users @ self.model.items.weight.T
        scores[torch.from_numpy(lengths == 0)] = -torch.inf
        return scores[torch.from_numpy(position)]


def training_sequences(data: Dataset) -> Sequences:
    """Each user's newest training context, oldest item first, and then its targets of all tasks."""
    examples, contexts = data.examples, data.contexts
    rows = examples.rows("train")
    # Contexts are numbered by cut: a user's last one is his newest.
    asked = np.unique(examples.contexts[rows])
    _, last = np.unique(contexts.users[asked][::-1], return_index=True)
    newest = asked[::-1][last]
    items, owner = gather(contexts.items, contexts.offsets, newest)
    items, owner = items[::-1], owner[::-1]
    answered = rows[np.isin(examples.contexts[rows], newest)]
    targets, place = gather(examples.targets, examples.target_offsets, answered)
    order = np.argsort(newest)
    target_owner = order[np.searchsorted(newest[order], examples.contexts[answered])][place]
    pairs = np.unique(np.stack([target_owner, targets], axis=1), axis=0)
    owners = np.concatenate([owner, pairs[:, 0]])
    placed = np.argsort(owners, kind="stable")  # within a user: history, then targets
    counts = np.bincount(owners, minlength=len(newest))
    return Sequences(np.concatenate([items, pairs[:, 1]])[placed], np.concatenate([[0], np.cumsum(counts)]))


def train_sasrec(
    data: Dataset, config: BaselineConfig, *, k: int, seed: int, log: LogFunction
) -> tuple[SasRec, TrainingSummary]:
    """Train a model; it ends with the weights of the best mean validation recall@k.

    As for target attention, the learning rate falls linearly with whichever runs out first, epochs or seconds. The seed
    is that of batches and negatives; `log` is called with (step, metrics) now and then.

    Raises:
        ConfigError: The weights are not finite in any evaluation.
    """
    settings, sequences = config.sasrec, training_sequences(data)
    model = SasRec(len(data.items), config.history_length, settings)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
    )
    loss_of = _choose_loss(model, data, config, seed)
    summary, best = TrainingSummary(), BestWeights(model, "baseline.sasrec.learning_rate")
    validation, random = data.examples.rows("validation"), np.random.default_rng(seed)
    num_steps = settings.max_epochs * sum(1 for _ in _batches(sequences, settings.batch_size, random))
    started, evaluated = time.monotonic(), 0
    losses: list[float] = []
    for epoch in range(settings.max_epochs):
        clock = time.monotonic()
        for rows in _batches(sequences, settings.batch_size, random):
            items, targets = _pad(sequences, rows, model.length + 1)
            progress = max(summary.steps / num_steps, elapsed_share(started, settings.max_seconds))
            warm_up = min(1.0, (summary.steps + 1) / WARM_UP_STEPS)
            optimizer.param_groups[0]["lr"] = settings.learning_rate * warm_up * max(FINAL_RATE, 1 - progress)
            losses.append(_step(model.train(), optimizer, loss_of, items, targets))
            summary.steps += 1
            summary.examples += int(targets.sum())
            if summary.steps % LOG_STEPS == 0:
                log(summary.steps, {"loss": float(np.mean(losses[-LOG_STEPS:]))})
            if time.monotonic() - started >= settings.max_seconds:
                summary.stopped_by = "time"
                break
        summary.seconds += time.monotonic() - clock
        over = summary.stopped_by == "time" or epoch + 1 == settings.max_epochs
        if not over and summary.steps - evaluated < MIN_EVAL_STEPS:
            continue
        recall = mean_recall(rank(SasRecScorer(model, data), data, validation, k), data, k)
        log(summary.steps, {f"validation_recall.{name}": value for name, value in recall.items()})
        evaluated = summary.steps
        best.note(summary, recall)
        if summary.stopped_by != "epochs":
            break
    best.restore()
    return model.eval(), summary


def _step(model: SasRec, optimizer: torch.optim.Optimizer, loss_of: Loss, items: Tensor, targets: Tensor) -> float:
    """One optimiser step on padded sequences, each item the input of the next."""
    known = targets[:, 1:]
    loss: Tensor = loss_of(model(items[:, :-1])[known], items[:, 1:][known])
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _choose_loss(model: SasRec, data: Dataset, config: BaselineConfig, seed: int) -> Loss:
    """The softmax loss of user vectors [P, d] and next items [P]: full, or sampled."""
    if not config.sasrec.num_negatives:
        return lambda users, targets: F.cross_entropy(users @ model.items.weight.T, targets)
    sampler = NegativeSampler(data.items.train_events, config.sasrec.negative_power, config.sasrec.num_negatives, seed)

    def sampled(users: Tensor, targets: Tensor) -> Tensor:
        negatives, log_expected = sampler.draw()
        scores = users @ model.items(negatives).T - log_expected
        scores = scores.masked_fill(targets.unsqueeze(1) == negatives, -torch.inf)
        positive = (users * model.items(targets)).sum(-1, keepdim=True)
        loss: Tensor = (torch.cat([positive, scores], dim=1).logsumexp(dim=1) - positive.squeeze(1)).mean()
        return loss

    return sampled


def _batches(sequences: Sequences, size: int, random: np.random.Generator) -> Iterator[Ints]:
    """One epoch of batches of like lengths, in random order; sequences of one item teach nothing."""
    lengths = np.diff(sequences.offsets)
    rows = random.permutation(np.flatnonzero(lengths > 1))
    batches: list[Ints] = []
    for start in range(0, len(rows), size * BATCHES_PER_BUCKET):
        bucket = rows[start : start + size * BATCHES_PER_BUCKET]
        bucket = bucket[np.argsort(lengths[bucket], kind="stable")]
        batches += [bucket[at : at + size] for at in range(0, len(bucket), size)]
    for place in random.permutation(len(batches)):
        yield batches[place]


def _pad(sequences: Sequences, rows: Ints, length: int) -> tuple[Tensor, Tensor]:
    """The newest `length` items of sequences, zeros after the end: items and where there is one, [B, L] each."""
    ends = sequences.offsets[rows + 1]
    lengths = np.minimum(ends - sequences.offsets[rows], length)
    columns = np.arange(max(1, lengths.max(initial=0)))
    mask = columns < lengths[:, None]
    flat = np.where(mask, (ends - lengths)[:, None] + columns, 0)
    items = sequences.items[flat] if len(sequences.items) else flat
    return torch.from_numpy(np.where(mask, items, 0)), torch.from_numpy(mask)
