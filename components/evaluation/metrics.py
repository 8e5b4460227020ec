"""Ranking metrics of many examples at once.

*Rank* is 0 for the best item of a list. With k the cut-off:

- recall@k = |top-k ∩ targets| / min(|targets|, k): a list that holds all that fits scores one;
- NDCG@k = Σ_{hits at rank r < k} 1 / log2(r + 2), over the same sum for a perfect list;
- coverage@k = share of the catalogue that stands in at least one top k;
- popularity bias@k = mean popularity quantile of the top-k items minus that of the targets: above zero, the model
  recommends what is more popular than what people then buy;
- novelty@k = mean of -log2 p over the top-k items, p an item's share of the training events, each counted once more so
  that an item without any has a share too: bits of surprise, the more the less popular.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

NOT_FOUND = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Ranked:
    """Where the targets of E examples stand in a model's lists: all that recall and NDCG need of them."""

    ranks: Ints  # rank of each target, flat [S]; NOT_FOUND where the list lacks it
    owners: Ints  # example of each target, 0 … E - 1, ascending [S]
    num_examples: int  # E

    @property
    def num_targets(self) -> Ints:
        """Targets of each example, [E]."""
        return np.bincount(self.owners, minlength=self.num_examples)

    def keep(self, targets: Mask) -> Ranked:
        """The same examples with some of their targets, by a mask [S]."""
        return Ranked(self.ranks[targets], self.owners[targets], self.num_examples)


@dataclass(frozen=True)
class Exposure:
    """What E lists show in their top k."""

    shown: Ints  # items of each top k, [E]
    quantile: Floats  # sum of the popularity quantiles of the top-k items, [E]
    surprise: Floats  # sum of their -log2 p, [E]


def find_ranks(items: Ints, offsets: Ints, targets: Ints, target_offsets: Ints) -> Ranked:
    """Find the targets in ranked lists.

    Args:
        items: Catalogue index of each list entry, flat, best first; no item twice in a list.
        offsets: Where each list starts, and the end, [E + 1].
        targets: Catalogue index of each target, flat; no item twice in an example.
        target_offsets: Where each example's targets start, and the end, [E + 1].
    """
    num_examples = len(offsets) - 1
    owners = np.repeat(np.arange(num_examples), np.diff(target_offsets))
    list_owners = np.repeat(np.arange(num_examples), np.diff(offsets))
    span = 1 + max(items.max(initial=0), targets.max(initial=0))
    keys, wanted = list_owners * span + items, owners * span + targets
    entries = np.flatnonzero(np.isin(keys, wanted))
    order = entries[np.argsort(keys[entries])]
    place = np.searchsorted(keys[order], wanted)
    found = np.isin(wanted, keys[order])
    ranks = np.full(len(targets), NOT_FOUND)
    hits = order[place[found]]
    ranks[found] = hits - offsets[list_owners[hits]]
    return Ranked(ranks, owners, num_examples)


def expose(items: Ints, offsets: Ints, k: int, quantiles: Floats, surprises: Floats) -> Exposure:
    """Popularity of the top-k items of each list (items and offsets as in `find_ranks`).

    `quantiles` and `surprises` (-log2 p) are those of the catalogue items, [n].
    """
    top, owners = first(items, offsets, k)
    num_examples = len(offsets) - 1
    return Exposure(
        np.bincount(owners, minlength=num_examples),
        np.bincount(owners, quantiles[top], minlength=num_examples).astype(np.float64),
        np.bincount(owners, surprises[top], minlength=num_examples).astype(np.float64),
    )


def first(items: Ints, offsets: Ints, k: int) -> tuple[Ints, Ints]:
    """The first k entries of each list, flat, and the example of each."""
    lengths = np.diff(offsets)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    top = np.arange(len(items)) - offsets[owners] < k
    return items[top], owners[top]


def count_hits(ranked: Ranked, k: int) -> Ints:
    """Targets among the first k items of each example, [E]."""
    return np.bincount(ranked.owners[ranked.ranks < k], minlength=ranked.num_examples)


def recall(hits: npt.ArrayLike, num_targets: npt.ArrayLike, k: npt.ArrayLike) -> Floats:
    """Recall@k of each example: hits / min(targets, k)."""
    return np.asarray(hits) / np.minimum(num_targets, k)


def ndcg(ranked: Ranked, k: int) -> Floats:
    """NDCG@k of each example, [E]; every example must have a target."""
    discounts = 1 / np.log2(np.arange(k) + 2)
    hit = ranked.ranks < k
    gain = np.bincount(ranked.owners[hit], discounts[ranked.ranks[hit]], minlength=ranked.num_examples)
    ideal: Floats = np.cumsum(discounts)[np.minimum(ranked.num_targets, k) - 1]
    return gain / ideal


def surprise(train_events: Ints) -> Floats:
    """-log2 of each catalogue item's share of the training events, each item counted once more, [n]."""
    bits: Floats = -np.log2((train_events + 1) / (train_events.sum() + len(train_events)))
    return bits
