"""A target-attention network (DIN, Zhou et al. 2018) for many recall tasks, built to score a full catalogue.

Notable against the paper:

- The candidate attends to the history by scaled dot product with an empty slot, so that the weights may sum to less
  than one: like DIN without softmax, it keeps how strong an interest is.
- The first layer of the scoring MLP is a sum of parts (candidate, attended history, match, user with task and query),
  so that what does not depend on the task, or not on the user, is computed once and shared.
- Whether the candidate itself is in the history, how often and how recently, is given as *match* features: over IDs,
  attention amounts to this, and repeats are nearly half of what people buy.
- A two-tower term beside the MLP (user · item) carries what needs more width than the hidden layer has.
- What no user changes is a piecewise linear function of each count of popularity, one per task. Nothing is counted from
  the training targets: the network would trust what knows the answer (docs/model.md).

Letters: n catalogue, B contexts, E examples, C shared candidates, O own candidates of a context, L history items,
d item width, h hidden width, T tasks that differ in their prompt, S user statistics, t text width.

With text (t > 0) the same network also gets frozen text vectors: a map of each, linear or with a hidden layer, adds to
the item's vector, and one of the query's vector to its words. Frozen ID vectors (components/items/id_vectors.py) may
add to the item's vector, too; in training those of the past, since the others know the targets. What they alone say
(components/items/id_scores.py) is added to the score by one weight per task, which is set after training.

With field matches the score has linear terms more, their weights one set per task: how many items of the history share
the candidate's category at each level or its brand, and in which fields it matches the query (query_match.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn import functional as F

from components.baseline.activation import activate
from components.baseline.query_match import NUM_QUERY_MATCHES, QueryMatches
from components.items.id_scores import history_weights
from components.items.id_vectors import URM_SCALE
from components.items.ramps import logarithm_slopes, ramp_features

NUM_STEPS = 12  # buckets of a history item's count and of its days, each the power of two it reaches
NUM_MATCH = 8  # features of a candidate that is in the history
HALF_LIVES_DAYS = (7.0, 28.0, 112.0)
RAMPS = 1  # of popularity, for each doubling; more make no difference


class NetworkShape(BaseModel):
    """Sizes that define the network; saved beside its weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_items: int
    feature_sizes: tuple[int, ...]
    num_behaviors: int
    num_words: int
    num_tasks: int
    num_statistics: int
    num_counts: int  # counts of popularity
    dimension: int
    hidden: int
    text_dimension: int = 0  # width of the frozen text vectors; 0: a network without text
    text_hidden: int = 0  # of the maps of texts; 0: linear maps
    id_dimension: int = 0  # width of the frozen ID vectors, both roles together; 0: a network without them
    matched_features: tuple[int, ...] = ()  # columns of the item features that candidate and history are compared in


class HistoryBatch(NamedTuple):
    """Newest history items of B contexts, padded; the index n stands for no item."""

    items: Tensor  # [B, L]
    counts: Tensor  # [B, L]
    days: Tensor  # [B, L]
    behaviors: Tensor  # [B, L]
    statistics: Tensor  # [B, S]


class ExampleBatch(NamedTuple):
    """E examples of those contexts."""

    contexts: Tensor  # [E], position in the history batch
    tasks: Tensor  # [E], number of the task's prompt
    words: Tensor  # query words, flat
    word_offsets: Tensor  # [E], where each example's words start
    query_vectors: Tensor  # [E, t], zero without a query
    matches: QueryMatches | None  # of the queries with the items, for a network with field matches


class Interest(NamedTuple):
    """What the network knows of B contexts before it sees a candidate."""

    keys: Tensor  # [B, L + 1, h]
    values: Tensor  # [B, L + 1, h]
    mask: Tensor  # [B, L + 1] bool, what may be attended to
    pooled: Tensor  # [B, d + S]


class Candidates(NamedTuple):
    """Item-side tensors; leading shape [n] for the catalogue, or any selection of it."""

    vectors: Tensor  # [..., d]
    queries: Tensor  # [..., h]
    hidden: Tensor  # [..., h]

    def select(self, items: Tensor) -> Candidates:
        """The rows of these items, in the shape of `items`."""
        return Candidates(*(F.embedding(items, part) for part in self))


class TargetAttention(nn.Module):
    """Scores candidates for a context under a task."""

    item_features: Tensor
    item_text: Tensor
    item_ids: Tensor
    item_ids_past: Tensor
    log_counts: Tensor
    ids_to_score: Tensor

    def __init__(self, shape: NetworkShape, dropout: float = 0.0, id_dropout: float = 0.0) -> None:
        super().__init__()
        self.shape = shape
        self.dropout, self.id_dropout = dropout, id_dropout
        d, h, num_tasks = shape.dimension, shape.hidden, shape.num_tasks
        self.register_buffer("item_features", torch.zeros(shape.num_items, len(shape.feature_sizes), dtype=torch.long))
        self.register_buffer("item_text", torch.zeros(shape.num_items, shape.text_dimension), persistent=False)
        for name in ("item_ids", "item_ids_past"):
            self.register_buffer(name, torch.zeros(shape.num_items, shape.id_dimension), persistent=False)
        self.register_buffer("log_counts", torch.zeros(shape.num_items, shape.num_counts), persistent=False)
        self.identity = _embedding(shape.num_items, d)
        self.features = nn.ModuleList(_embedding(size, d) for size in shape.feature_sizes)
        self.behavior, self.count, self.recency = (
            _embedding(size, d) for size in (shape.num_behaviors, NUM_STEPS, NUM_STEPS)
        )
        self.to_query, self.to_key, self.to_value = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(d, h)
        self.to_pooling = nn.Linear(d, 1)
        self.task = _embedding(num_tasks, d)
        self.words = nn.EmbeddingBag(max(1, shape.num_words), d, mode="sum")
        nn.init.normal_(self.words.weight, std=0.1)
        self.user = nn.Sequential(nn.Linear(3 * d + shape.num_statistics, 2 * d), nn.ReLU(), nn.Linear(2 * d, d))
        self.candidate_to_hidden = nn.Linear(d, h)
        self.user_to_hidden = nn.Linear(d, h)
        self.match_to_hidden = nn.Linear(NUM_MATCH, h, bias=False)
        self.hidden_to_score = nn.Parameter(torch.randn(num_tasks, h) / math.sqrt(h))
        # What a user had before is likelier than its popularity says; the data decide how much.
        start = torch.tensor([3.0, 1.0] + [0.0] * (NUM_MATCH - 2))
        self.match_to_score = nn.Parameter(start.repeat(num_tasks, 1))
        self.item_to_match = nn.Linear(d, NUM_MATCH, bias=False)  # how much an item is one to be bought again
        # At first the score is log(1 + baskets).
        slopes = logarithm_slopes([1.0, *[0.0] * (shape.num_counts - 1)], RAMPS)
        self.popularity_to_score = nn.Parameter(slopes.repeat(num_tasks, 1))
        if shape.text_dimension:
            self.text_to_item = _text_map(shape.text_dimension, shape.text_hidden, d)
            self.query_to_user = _text_map(shape.text_dimension, shape.text_hidden, d)
        if shape.id_dimension:
            self.ids_to_item = nn.Linear(shape.id_dimension, d, bias=False)
            self.register_buffer("ids_to_score", torch.zeros(num_tasks))
        if shape.matched_features:
            self.history_match_to_score = nn.Parameter(torch.zeros(num_tasks, len(shape.matched_features)))
            self.query_match_to_score = nn.Parameter(torch.ones(num_tasks, NUM_QUERY_MATCHES))

    def item_vectors(self, items: Tensor | None = None) -> Tensor:
        """ID embedding plus those of the item's features, and its text, [m, d]; of the whole catalogue by default."""
        items = torch.arange(self.shape.num_items) if items is None else items
        vectors: Tensor = self.identity(items)
        if self.training and self.id_dropout:
            vectors = vectors * (torch.rand(len(items), 1) >= self.id_dropout)
        for table, codes in zip(self.features, self.item_features[items].T, strict=True):
            vectors = vectors + table(codes)
        if self.shape.text_dimension:
            vectors = vectors + self.text_to_item(self.item_text[items])
        if self.shape.id_dimension:
            vectors = vectors + self.ids_to_item((self.item_ids_past if self.training else self.item_ids)[items])
        return self._drop(vectors)

    def encode_candidates(self, items: Tensor | None = None) -> Candidates:
        """Item-side tensors of items [m]; of the whole catalogue by default."""
        vectors = self.item_vectors(items)
        return Candidates(vectors, self.to_query(vectors), self.candidate_to_hidden(vectors))

    def encode_contexts(self, batch: HistoryBatch, catalogue: Candidates) -> Interest:
        """Keys, values and the pooled history of each context; an empty history pools to zero.

        Items of the histories are rows of `catalogue`, and its length stands for no item.
        """
        num_items = len(catalogue.vectors)
        present = batch.items < num_items
        items = F.embedding(batch.items.clamp(max=num_items - 1), catalogue.vectors)
        items = items + self.behavior(batch.behaviors) + self.count(_step(batch.counts))
        items = items + self.recency(_step(batch.days))
        # The empty slot comes last: its key of zero length scores every candidate zero.
        keys, values = F.pad(self.to_key(items), (0, 0, 0, 1)), F.pad(self.to_value(items), (0, 0, 0, 1))
        weights = self.to_pooling(items).squeeze(-1).masked_fill(~present, -1e9).softmax(-1) * present
        pooled = torch.einsum("bl,bld->bd", weights, items)
        mask = F.pad(present, (0, 1), value=True)
        return Interest(keys, values, mask, torch.cat([pooled, batch.statistics], dim=-1))

    def encode_users(self, batch: ExampleBatch, interest: Interest) -> Tensor:
        """User vectors under task and query, [E, d]."""
        query = self.words(batch.words, batch.word_offsets)
        if self.shape.text_dimension:
            query = query + self.query_to_user(batch.query_vectors)
        users: Tensor = self.user(torch.cat([interest.pooled[batch.contexts], self.task(batch.tasks), query], dim=-1))
        return self._drop(users)

    def attend(self, queries: Tensor, interest: Interest) -> Tensor:
        """Attended history of each candidate, [B, C, h], for queries of shape [B, C, h]."""
        keys, values, mask = interest.keys.unsqueeze(1), interest.values.unsqueeze(1), interest.mask[:, None, None]
        return F.scaled_dot_product_attention(queries.unsqueeze(1), keys, values, attn_mask=mask).squeeze(1)

    def activate(self, hidden: Tensor, users: Tensor, batch: ExampleBatch) -> Tensor:
        """Output of the MLP, [E, C], for the user-independent part of its first layer, [B, C, h]."""
        return activate(hidden, self.user_to_hidden(users), self.hidden_to_score[batch.tasks], batch.contexts)

    def popularity_bias(self, items: Tensor | None = None) -> Tensor:
        """Part of the scores of items [m] that no user changes, [T, m]; of the whole catalogue by default."""
        log_counts = self.log_counts if items is None else self.log_counts[items]
        return self.popularity_to_score @ ramp_features(log_counts, RAMPS).T

    def id_scores(self, history: Tensor) -> Tensor:
        """What the ID vectors alone say of the catalogue, [B, n], of a network that has them.

        `history`: items [B, L], n where padded, newest first.
        """
        candidates, in_history = self.item_ids.chunk(2, dim=1)
        known = history < self.shape.num_items
        vectors = F.embedding(history.clamp(max=self.shape.num_items - 1), in_history)
        users = torch.einsum("bl,bld->bd", history_weights(known), vectors)
        return URM_SCALE * users @ candidates.T

    def match_history(self, history: Tensor, items: Tensor) -> Tensor:
        """log(1 + history items with the candidate's value) of each matched feature, [B, C, F].

        `history`: items [B, L], n where padded; `items`: candidates [C], or [B, C] of each context.
        """
        num_items, rows = self.shape.num_items, torch.arange(len(history)).unsqueeze(1)
        present = (history < num_items).float()
        columns = []
        for feature in self.shape.matched_features:
            codes = self.item_features[:, feature]
            counts = torch.zeros(len(history), self.shape.feature_sizes[feature])
            counts.scatter_add_(1, codes[history.clamp(max=num_items - 1)], present)
            counts[:, 0] = 0  # unknown values are not alike
            columns.append(counts.log1p()[rows, codes[items.clamp(max=num_items - 1)]])
        return torch.stack(columns, dim=-1)

    def _drop(self, vectors: Tensor) -> Tensor:
        return F.dropout(vectors, self.dropout) if self.training and self.dropout else vectors


def match_features(counts: Tensor, days: Tensor, active_days: Tensor) -> Tensor:
    """Features of a candidate that the user had before, [..., NUM_MATCH].

    `counts`: how often; `days`: since the last time; `active_days`: on which the user was active; all [...].
    """
    often = torch.log1p(counts)
    decays = [torch.exp2(-days / half_life) for half_life in HALF_LIVES_DAYS]
    share = counts / active_days.clamp(min=1)
    parts = [torch.ones_like(counts), often, torch.log1p(days) / 4, *decays, share, often * decays[-1]]
    return torch.stack(parts, dim=-1)


def _embedding(size: int, dimension: int) -> nn.Embedding:
    table = nn.Embedding(size, dimension)
    nn.init.normal_(table.weight, std=0.1)
    return table


def _text_map(width: int, hidden: int, dimension: int) -> nn.Module:
    if not hidden:
        return nn.Linear(width, dimension, bias=False)
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, dimension, bias=False))


def _step(values: Tensor) -> Tensor:
    return torch.log2(1 + values.clamp(min=0)).long().clamp(max=NUM_STEPS - 1)
