"""The target-attention network on this stage's data: scores of training batches, and of the full catalogue."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from components.baseline.batches import Batcher, TrainingBatch
from components.baseline.data import Dataset, Floats, Ints
from components.baseline.loss import NegativeSampler, accidental_hits, sampled_softmax_loss
from components.baseline.network import Candidates, Interest, NetworkShape, TargetAttention
from components.config import BaselineConfig


class Frozen(NamedTuple):
    """Frozen vectors of the items, zero where absent; none for a network without them."""

    text: Floats | None = None  # [n, t]
    ids: Floats | None = None  # ID vectors of both roles side by side, [n, 2d]
    ids_past: Floats | None = None  # the same of the past, for training


def build_network(data: Dataset, config: BaselineConfig, frozen: Frozen | None = None) -> TargetAttention:
    """A network for this data, before training."""
    frozen = frozen or Frozen()
    shape = NetworkShape(
        num_items=len(data.items),
        feature_sizes=tuple(int(size) + 1 for size in data.items.features.max(axis=0)),
        num_behaviors=data.contexts.num_behaviors,
        num_words=len(data.examples.vocabulary),
        num_tasks=int(data.prompts.max()) + 1,
        num_statistics=data.contexts.statistics.shape[1],
        num_counts=data.items.log_counts.shape[1],
        dimension=config.dimension,
        hidden=config.hidden,
        text_dimension=0 if frozen.text is None else frozen.text.shape[1],
        text_hidden=0 if frozen.text is None else config.text_hidden,
        id_dimension=0 if frozen.ids is None else frozen.ids.shape[1],
        matched_features=_matched_features(data) if config.field_matches else (),
    )
    network = TargetAttention(shape, config.dropout, config.id_dropout)
    network.item_features.copy_(torch.from_numpy(data.items.features))
    for buffer, vectors in (
        (network.item_text, frozen.text),
        (network.item_ids, frozen.ids),
        (network.item_ids_past, frozen.ids_past),
    ):
        if vectors is not None:
            buffer.copy_(torch.from_numpy(vectors))
    network.log_counts.copy_(torch.from_numpy(data.items.log_counts))
    return network


def _matched_features(data: Dataset) -> tuple[int, ...]:
    """Columns of the categories and the brand."""
    return tuple(column for column, name in enumerate(data.items.names) if name.startswith(("category", "brand")))


def training_loss(network: TargetAttention, batch: TrainingBatch, sampler: NegativeSampler) -> Tensor:
    """Sampled-softmax loss of a batch, its negatives drawn by the sampler."""
    negatives, log_expected = sampler.draw()
    own_scores, negative_scores = score_training_batch(network, batch, negatives)
    contexts, items, num_items = batch.examples.contexts, batch.own.items, network.shape.num_items
    bought = batch.own.match[..., 0] > 0
    no_candidate = (items == num_items)[contexts]
    no_candidate |= batch.exclude_bought.unsqueeze(1) & bought[contexts]
    hits = accidental_hits(items, negatives, num_items)[contexts]
    return sampled_softmax_loss(
        own_scores.masked_fill(no_candidate, -torch.inf),
        negative_scores.masked_fill(hits, -torch.inf),
        log_expected,
        batch.targets,
    )


def score_training_batch(network: TargetAttention, batch: TrainingBatch, negatives: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of each example's own candidates, [E, O], and of the shared negatives, [E, m]."""
    num_items = network.shape.num_items
    # Only items that the batch names are encoded; their rows stand for them from here on, and no item comes after all.
    mentioned = torch.cat([batch.history.items.flatten(), batch.own.items.flatten(), negatives])
    named = torch.bincount(mentioned, minlength=num_items)[:num_items].nonzero().squeeze(1)
    known = network.encode_candidates(named)
    history = batch.history._replace(items=torch.searchsorted(named, batch.history.items))
    interest = network.encode_contexts(history, known)
    users = network.encode_users(batch.examples, interest)
    contexts, tasks = batch.examples.contexts, batch.examples.tasks
    slots = _slots(contexts)
    bias = network.popularity_bias(named)
    drawn = torch.searchsorted(named, negatives)
    owned = torch.searchsorted(named, batch.own.items).clamp(max=len(named) - 1)  # any row where there is none

    shared = known.select(drawn)
    hidden = shared.hidden + network.attend(shared.queries.expand(len(interest.keys), -1, -1), interest)
    negative_scores = users @ shared.vectors.T + bias[:, drawn][tasks] + network.activate(hidden, users, batch.examples)

    items, match = batch.own.items.clamp(max=num_items - 1), batch.own.match
    own = known.select(owned)
    hidden = own.hidden + network.attend(own.queries, interest) + network.match_to_hidden(match)
    again = (match * network.item_to_match(own.vectors)).sum(-1)
    own_scores = _of_own_context(own.vectors, users, contexts, slots) + again[contexts]
    own_scores = own_scores + bias[tasks.unsqueeze(1), owned[contexts]]
    own_scores = own_scores + _of_own_context(match, network.match_to_score[tasks], contexts, slots)
    if network.shape.matched_features:
        own_scores = own_scores + _match_fields(network, batch, items)
        negative_scores = negative_scores + _match_fields(network, batch, negatives)
    return own_scores + network.activate(hidden, users, batch.examples), negative_scores


def _slots(contexts: Tensor) -> Tensor:
    """Position of each example among those of its context, from 0, [E]."""
    order = contexts.argsort(stable=True)
    ordered = contexts[order]
    slots = torch.empty_like(contexts)
    slots[order] = torch.arange(len(contexts)) - torch.searchsorted(ordered, ordered)
    return slots


def _of_own_context(values: Tensor, weights: Tensor, contexts: Tensor, slots: Tensor) -> Tensor:
    """Inner products of weights [E, f] with the values [B, O, f] of each example's context, [E, O].

    Examples of one context share a matrix product; the values are not repeated for each.
    """
    grouped = weights.new_zeros(len(values), int(slots.max()) + 1, weights.shape[1])
    grouped = grouped.index_put((contexts, slots), weights)
    return torch.bmm(grouped, values.transpose(1, 2))[contexts, slots]


def _match_fields(network: TargetAttention, batch: TrainingBatch, items: Tensor) -> Tensor:
    """What field matches add to the scores of shared items [C], or of each context's own [B, C]; shape [E, C]."""
    examples, matches = batch.examples, batch.examples.matches
    alike = network.match_history(batch.history.items, items)[examples.contexts]
    added = torch.einsum("ecf,ef->ec", alike, network.history_match_to_score[examples.tasks])
    if matches is None:
        return added
    fit = matches.of_shared(items) if items.ndim == 1 else matches.of_own(items[examples.contexts])
    return added + torch.einsum("ecf,ef->ec", fit, network.query_match_to_score[examples.tasks])


class TargetAttentionScorer:
    """Scores the full catalogue; item-side tensors are computed once."""

    @torch.no_grad()
    def __init__(self, network: TargetAttention, batcher: Batcher) -> None:
        self.network = network.eval()
        self.batcher = batcher
        self.catalogue: Candidates = network.encode_candidates()
        self.again: Tensor = network.item_to_match(self.catalogue.vectors)
        self.bias: Tensor = network.popularity_bias()

    @torch.no_grad()
    def score(self, rows: Ints) -> Tensor:
        """Scores of shape [len(rows), catalogue]."""
        data = self.batcher.data
        contexts, positions = np.unique(data.examples.contexts[rows], return_inverse=True)
        histories = self.batcher.history(contexts)
        interest = self.network.encode_contexts(histories, self.catalogue)
        examples = self.batcher.examples(rows, positions)
        users = self.network.encode_users(examples, interest)
        scores = users @ self.catalogue.vectors.T
        scores += self.bias[examples.tasks]
        if self.network.shape.id_dimension and self.network.ids_to_score.any():
            weights = self.network.ids_to_score[examples.tasks].unsqueeze(1)
            scores += weights * self.network.id_scores(histories.items)[torch.from_numpy(positions)]
        if examples.matches is not None:
            scores += examples.matches.weighted(self.network.query_match_to_score[examples.tasks])
        everything = torch.arange(len(data.items))
        owner, items, match = (torch.as_tensor(part) for part in self.batcher.match(contexts))
        for position in range(len(contexts)):
            mine = owner == position
            here = slice(position, position + 1)
            known = interest.mask[position]  # attention costs the most: leave out padding
            one = Interest(
                interest.keys[here, known],
                interest.values[here, known],
                interest.mask[here, known],
                interest.pooled[here],
            )
            selected = torch.from_numpy(np.flatnonzero(positions == position))
            if examples.matches is not None:  # of one context at a time: a number per item of the catalogue and feature
                alike = self.network.match_history(histories.items[here], everything)[0]
                scores[selected] += self.network.history_match_to_score[examples.tasks[selected]] @ alike.T
            self._add_attention(scores, selected, examples.tasks, users, one, items[mine], match[mine])
        return scores

    def _add_attention(
        self,
        scores: Tensor,
        rows: Tensor,
        tasks: Tensor,
        users: Tensor,
        interest: Interest,
        items: Tensor,
        match: Tensor,
    ) -> None:
        """Add the MLP's output and the match terms to the rows of one context, which share the attention."""
        network = self.network
        hidden = self.catalogue.hidden + network.attend(self.catalogue.queries.unsqueeze(0), interest)[0]
        hidden[items] += network.match_to_hidden(match)
        again = (match * self.again[items]).sum(-1)
        from_users = network.user_to_hidden(users)
        for row in rows.tolist():
            task = tasks[row]
            scores[row] += (hidden + from_users[row]).relu_() @ network.hidden_to_score[task]
            scores[row, items] += again + match @ network.match_to_score[task]
