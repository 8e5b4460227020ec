"""The ID model: how likely each item follows a user's history, learned from the log.

    B examples · L history items · n items · d width · N negatives

    history vector     h_i = E_i + Σ_a A_a(i) + T text_i        E: of the item itself (its ID)
    candidate vector   x_j = E'_j + Σ_a A'_a(j) + T' text_j     A: of its category and brand;  T: linear
    score(user, j)     = τ · (Σ_p w_p h_p) · x_j + β · log(1 + count_j),   w_p ∝ age_p^(-δ), of sum one

age counts the user's baskets back from the newest one. This is an item-to-item factorisation with two roles (FISM,
Kabbur et al. 2013) in which newer items matter more, trained by a sampled softmax with log-Q correction (Yi et al.
2019) on the next items. Dropout acts on every entry of h and x, and sometimes on the whole of E, so that an item
without events is placed by its text, category and brand.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from components.items.cooccurrence import Baskets, Ints
from components.items.frequency import FrequencySampler

Floats = npt.NDArray[np.float32]

# Chosen on validation of Amazon Beauty, see docs/results/.
REACH = 20  # history items of an example
BATCH_SIZE, NUM_NEGATIVES, NEGATIVE_POWER = 512, 2048, 0.75
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.3
DROPOUT, ID_DROPOUT = 0.5, 0.1
FIRST_SPREAD, FIRST_SCALE = 0.05, 8.0
LOG_STEPS = 50


@dataclass(frozen=True)
class ItemContent:
    """Content of n items."""

    text: npt.NDArray[np.floating]  # frozen text vectors [n, t], zero where absent; computed with in float32
    attributes: Ints  # number of each item's value of each attribute [n, a], 0 for none


class FollowBatch(NamedTuple):
    """Some of the examples [b]."""

    history: Ints  # items of the user's baskets before, newest first [b, L]; n stands for none
    ages: Ints  # how many baskets ago each was, from 1 on [b, L]
    owners: Ints  # basket of each example [b]
    targets: Ints  # the item that came next [b]


@dataclass(frozen=True)
class FollowExamples:
    """Examples: each item of a basket that is not its user's first, given the user's earlier items.

    Histories are read from the baskets when they are asked for: all at once take 40 times the memory of the log.
    """

    baskets: Baskets
    owners: npt.NDArray[np.signedinteger]  # basket of each entry of the baskets' matrix
    entries: npt.NDArray[np.signedinteger]  # of the matrix, one per example

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.entries)

    def read(self, places: npt.NDArray[np.signedinteger]) -> FollowBatch:
        """The examples at some places [b]."""
        matrix, users = self.baskets.matrix, self.baskets.users
        owners = self.owners[self.entries[places]].astype(np.int64)
        oldest = matrix.indptr[np.searchsorted(users, users[owners])]  # the user's first entry
        before = matrix.indptr[owners][:, None] - 1 - np.arange(REACH)  # newest first
        known = before >= oldest[:, None]
        before = np.where(known, before, 0)
        history = np.where(known, matrix.indices[before], matrix.shape[1]).astype(np.int64)
        ages = np.where(known, owners[:, None] - self.owners[before], 0)
        return FollowBatch(history, ages, owners, matrix.indices[self.entries[places]].astype(np.int64))


class IdNetwork(nn.Module):
    """Vectors of items in both roles."""

    text: torch.Tensor
    attributes: torch.Tensor
    seen: torch.Tensor
    log_count: torch.Tensor

    def __init__(self, content: ItemContent, kept: npt.NDArray[np.bool_], dimension: int, seed: int) -> None:
        """Take the content of the items, and which of them may have an ID embedding [n].

        No item counts as seen before `set_counts`.
        """
        super().__init__()
        num_items, text_width = content.text.shape
        self.register_buffer("text", torch.from_numpy(content.text))
        self.register_buffer("attributes", torch.from_numpy(content.attributes))
        self.register_buffer("seen", torch.zeros(num_items, dtype=torch.bool))
        self.register_buffer("log_count", torch.zeros(num_items))
        sizes = (content.attributes.max(axis=0, initial=0) + 1).tolist()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.roles = nn.ModuleList(_Role(torch.from_numpy(kept), sizes, text_width, dimension) for _ in "hx")
        self.decay = nn.Parameter(torch.ones(1))
        self.log_scale = nn.Parameter(torch.tensor([math.log(FIRST_SCALE)]))
        self.popularity = nn.Parameter(torch.tensor([0.5]))

    def set_counts(self, counts: Floats, min_count: float) -> None:
        """Set the number of baskets with each item [n]; an item with fewer than `min_count` gets no ID embedding."""
        self.seen.copy_(torch.from_numpy(counts >= max(1.0, min_count)))
        self.log_count.copy_(torch.from_numpy(np.log1p(counts)))

    def vectors(self, role: int, items: torch.Tensor) -> torch.Tensor:
        """Vectors [u, d] of items [u] as part of a history (role 0) or as candidates (role 1)."""
        own = self.seen[items]
        if self.training:
            own = own & (torch.rand(len(items)) >= ID_DROPOUT)
        vectors: torch.Tensor = self.roles[role](items, own, self.attributes[items], self.text[items].float())
        return functional.dropout(vectors, DROPOUT, self.training)

    def users(self, history: torch.Tensor, ages: torch.Tensor) -> torch.Tensor:
        """User vectors [B, d] of histories [B, L]; n stands for no item."""
        known = history < len(self.seen)
        distinct, places = torch.unique(history.clamp(max=len(self.seen) - 1), return_inverse=True)
        weights = known * torch.exp(-self.decay * ages.clamp(min=1).log())
        weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
        return torch.einsum("bl,bld->bd", weights, self.vectors(0, distinct)[places])

    def loss(
        self,
        history: torch.Tensor,
        ages: torch.Tensor,
        targets: torch.Tensor,
        negatives: torch.Tensor,
        log_expected: torch.Tensor,
        accidental: torch.Tensor,
    ) -> torch.Tensor:
        """Sampled softmax of targets [B] against negatives [N]; accidental [B, N] marks negatives that are targets."""
        users = self.users(history, ages) * self.log_scale.exp()
        candidates = self.vectors(1, torch.cat([targets, negatives]))
        bias = self.popularity * self.log_count
        wanted = (users * candidates[: len(targets)]).sum(dim=1) + bias[targets]
        others = users @ candidates[len(targets) :].T + bias[negatives] - log_expected
        others = others.masked_fill(accidental, -torch.inf)
        return (torch.logsumexp(torch.cat([wanted[:, None], others], dim=1), dim=1) - wanted).mean()


class _Role(nn.Module):
    """Vectors of one role."""

    places: torch.Tensor

    def __init__(self, kept: torch.Tensor, sizes: list[int], text_width: int, dimension: int) -> None:
        super().__init__()
        # Drawn for all items, so that an item's start does not depend on which others are kept.
        first = torch.randn(len(kept), dimension).mul_(FIRST_SPREAD)[kept]
        self.identity = nn.Embedding(len(first), dimension, _weight=first)
        self.register_buffer("places", (kept.cumsum(0) - 1).clamp(min=0))
        tables = [nn.Embedding(size, dimension) for size in sizes]
        for table in tables:
            nn.init.normal_(table.weight, std=FIRST_SPREAD)
        self.tables = nn.ModuleList(tables)
        self.of_text = nn.Linear(text_width, dimension, bias=False)

    def forward(
        self, items: torch.Tensor, own: torch.Tensor, attributes: torch.Tensor, text: torch.Tensor
    ) -> torch.Tensor:
        vectors: torch.Tensor = self.of_text(text)
        if len(self.identity.weight):
            vectors = vectors + self.identity(self.places[items]) * own[:, None]
        for table, values in zip(self.tables, attributes.T, strict=True):
            vectors = vectors + table(values)
        return vectors


def follow_examples(baskets: Baskets) -> FollowExamples:
    """One example per item of every basket but the first of each user."""
    matrix, narrow = baskets.matrix, baskets.matrix.indices.dtype
    owners = np.repeat(np.arange(matrix.shape[0], dtype=narrow), np.diff(matrix.indptr))
    has_history = matrix.indptr[:-1] > matrix.indptr[np.searchsorted(baskets.users, baskets.users)]
    return FollowExamples(baskets, owners, np.arange(len(owners), dtype=narrow)[has_history[owners]])


def train_id_network(
    network: IdNetwork,
    examples: FollowExamples,
    *,
    epochs: int,
    max_steps: int,
    final_rate: float,
    seed: int,
    report: Callable[[int, int, float], None],
) -> None:
    """Train a network, new or trained before, in place, at most `max_steps` steps of BATCH_SIZE examples.

    The learning rate falls linearly to the share `final_rate` of it; 1 keeps it. The seed is that of order, negatives
    and dropout. `report` is called every LOG_STEPS steps with the step, the number of steps, and the loss.
    """
    steps = min(max_steps, epochs * -(-len(examples) // BATCH_SIZE))
    rng = np.random.default_rng(seed)
    sampler = FrequencySampler(np.expm1(network.log_count.numpy()), NUM_NEGATIVES, NEGATIVE_POWER)
    optimizer = torch.optim.AdamW(_groups(network), lr=LEARNING_RATE, fused=True)
    network.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for step, batch in enumerate(_batches(len(examples), steps, rng)):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - (1 - final_rate) * step / steps)
            loss = _loss(network, examples, batch, *sampler.draw(rng))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            if (step + 1) % LOG_STEPS == 0:
                report(step + 1, steps, loss.item())
    optimizer.zero_grad()  # gradients take as much memory as the network
    network.eval()


def _loss(
    network: IdNetwork,
    examples: FollowExamples,
    places: npt.NDArray[np.signedinteger],
    drawn: Ints,
    log_expected: Floats,
) -> torch.Tensor:
    batch = examples.read(places)
    accidental = examples.baskets.matrix[batch.owners][:, drawn].toarray() > 0
    return network.loss(
        torch.from_numpy(batch.history),
        torch.from_numpy(batch.ages),
        torch.from_numpy(batch.targets),
        torch.from_numpy(drawn),
        torch.from_numpy(log_expected),
        torch.from_numpy(accidental),
    )


def _batches(num_examples: int, steps: int, rng: np.random.Generator) -> list[npt.NDArray[np.signedinteger]]:
    batches: list[npt.NDArray[np.signedinteger]] = []
    while len(batches) < steps:
        order: npt.NDArray[np.signedinteger] = np.arange(num_examples, dtype=_narrowest(num_examples))
        rng.shuffle(order)
        order = order[: (steps - len(batches)) * BATCH_SIZE].copy()  # a few steps need a small part of a large log
        batches += [order[start : start + BATCH_SIZE] for start in range(0, len(order), BATCH_SIZE)]
    return batches


def _narrowest(number: int) -> type[np.signedinteger]:
    return np.int32 if number < 2**31 else np.int64


def _groups(network: IdNetwork) -> list[dict[str, object]]:
    """Weight decay for matrices, none for vectors."""
    matrices = [weight for weight in network.parameters() if weight.ndim > 1]
    numbers = [weight for weight in network.parameters() if weight.ndim == 1]
    return [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": numbers, "weight_decay": 0.0}]
