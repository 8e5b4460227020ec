"""Padded tensors of contexts and examples, and training batches with sampled candidates."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.baseline.data import Dataset, Floats, Ints, gather, places
from components.baseline.network import NUM_MATCH, ExampleBatch, HistoryBatch, match_features
from components.baseline.query_match import QueryMatcher


class OwnCandidates(NamedTuple):
    """History and targets of each context: candidates that the softmax holds exactly, not by sampling."""

    items: Tensor  # [B, O], n where padded
    match: Tensor  # [B, O, NUM_MATCH], zero for an item that is not in the history


class TrainingBatch(NamedTuple):
    """Examples of B contexts with their candidates."""

    history: HistoryBatch
    examples: ExampleBatch
    own: OwnCandidates
    targets: Tensor  # [E, O], 1 / number of targets where the own candidate is one, else 0
    exclude_bought: Tensor  # [E] bool, whether the task drops what the user had


class Batcher:
    """Builds tensors for rows of a data set, with the newest `history_length` items of each history.

    `query_vectors` are the frozen text vectors of the distinct queries, [Q, t]; none for a network without text.
    `matcher` is for a network with field matches.
    """

    def __init__(
        self,
        data: Dataset,
        history_length: int,
        query_vectors: Floats | None = None,
        matcher: QueryMatcher | None = None,
    ) -> None:
        self.data = data
        self.matcher = matcher
        self.history_length = history_length
        known_queries = (
            np.zeros((len(data.examples.queries), 0), np.float32) if query_vectors is None else query_vectors
        )
        self.query_vectors: Floats = np.pad(known_queries, ((0, 1), (0, 0)))  # the last row, -1, is that of no query
        rows = np.unique(data.examples.contexts[data.examples.rows("train")])
        known = data.contexts.statistics[rows]
        self.mean: Floats = known.mean(axis=0)
        self.scale: Floats = known.std(axis=0) + np.float32(1e-3)

    def history(self, contexts: Ints) -> HistoryBatch:
        """The newest `history_length` items of each context."""
        table = self.data.contexts
        lengths = np.minimum(table.offsets[contexts + 1] - table.offsets[contexts], self.history_length)
        columns = np.arange(max(1, lengths.max(initial=0)))
        mask = columns < lengths[:, None]
        flat = np.where(mask, table.offsets[contexts][:, None] + columns, 0)
        no_item = len(self.data.items)
        return HistoryBatch(
            items=torch.from_numpy(np.where(mask, _take(table.items, flat), no_item)),
            counts=torch.from_numpy(np.where(mask, _take(table.counts, flat), 0)),
            days=torch.from_numpy(np.where(mask, _take(table.days, flat), 0)),
            behaviors=torch.from_numpy(np.where(mask, _take(table.behaviors, flat), 0)),
            statistics=torch.from_numpy((table.statistics[contexts] - self.mean) / self.scale),
        )

    def examples(self, rows: Ints, positions: Ints) -> ExampleBatch:
        """Tasks and queries of example rows; `positions` are those of their contexts in the history batch."""
        examples = self.data.examples
        words, owner = gather(examples.words, examples.word_offsets, rows)
        return ExampleBatch(
            contexts=torch.from_numpy(positions),
            tasks=torch.from_numpy(self.data.prompts[examples.tasks[rows]]),
            words=torch.from_numpy(words),
            word_offsets=torch.from_numpy(np.searchsorted(owner, np.arange(len(rows)))),
            query_vectors=torch.from_numpy(self.query_vectors[examples.query[rows]]),
            matches=self.matcher.of(examples.query[rows]) if self.matcher else None,
        )

    def match(self, contexts: Ints) -> tuple[Ints, Ints, Tensor]:
        """Whole histories of contexts as candidates: position in `contexts`, item, match features, all flat."""
        table = self.data.contexts
        flat, owner = places(table.offsets, contexts)
        active_days = np.expm1(table.statistics[contexts, 2])[owner]
        counts, days = torch.from_numpy(table.counts[flat]), torch.from_numpy(table.days[flat])
        return owner, table.items[flat], match_features(counts, days, torch.from_numpy(active_days))

    def training(self, rows: Ints) -> TrainingBatch:
        """A batch of training examples; rows of one context may stand anywhere."""
        num_items = len(self.data.items)
        contexts, positions = np.unique(self.data.examples.contexts[rows], return_inverse=True)
        targets, owner = gather(self.data.examples.targets, self.data.examples.target_offsets, rows)
        target_keys = positions[owner] * num_items + targets
        bought_owner, bought_items, features = self.match(contexts)
        bought_keys = bought_owner * num_items + bought_items
        keys = np.unique(np.concatenate([target_keys, bought_keys]))
        starts = np.searchsorted(keys, np.arange(len(contexts)) * num_items)
        column = np.arange(len(keys)) - starts[keys // num_items]

        shape = (len(contexts), int(column.max()) + 1)
        items = np.full(shape, num_items)
        items[keys // num_items, column] = keys % num_items
        bought_column = torch.from_numpy(column[np.searchsorted(keys, bought_keys)])
        match = torch.zeros(*shape, NUM_MATCH)
        match[torch.from_numpy(bought_owner), bought_column] = features
        weights = np.zeros((len(rows), shape[1]), dtype=np.float32)
        weights[owner, column[np.searchsorted(keys, target_keys)]] = 1 / np.bincount(owner, minlength=len(rows))[owner]
        return TrainingBatch(
            history=self.history(contexts),
            examples=self.examples(rows, positions),
            own=OwnCandidates(torch.from_numpy(items), match),
            targets=torch.from_numpy(weights),
            exclude_bought=torch.from_numpy(self.data.exclude_bought[self.data.examples.tasks[rows]]),
        )


def _take(values: npt.NDArray[Any], flat: Ints) -> npt.NDArray[Any]:
    return values[flat] if len(values) else np.zeros(flat.shape, dtype=values.dtype)
