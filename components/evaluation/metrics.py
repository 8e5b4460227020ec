"""Ranking metrics of many examples at once.

A `Ranked` holds the lists of E examples, flat; *rank* is 0 for the best item. With k the cut-off:

- recall@k = |top-k ∩ targets| / min(|targets|, k): a list that holds all that fits scores one;
- NDCG@k = Σ_{hits at rank r < k} 1 / log2(r + 2), over the same sum for a perfect list;
- coverage@k = share of the catalogue that stands in somebody's top k;
- popularity bias@k = mean popularity quantile of the top-k items minus that of the targets: above zero, the model
  recommends what is more popular than what people then buy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ranked:
    """Ranked lists and targets of E examples.

    Attributes:
        items: Item of each list entry, flat [R], entries of one example together and best first.
        owners: Example of each entry, 0 … E - 1, ascending [R].
        ranks: Its rank within the list [R].
        is_target: Whether the entry is a target of its example, bool [R].
        num_targets: Targets of each example [E].
    """

    items: Ints
    owners: Ints
    ranks: Ints
    is_target: npt.NDArray[np.bool_]
    num_targets: Ints

    def select(self, examples: npt.NDArray[np.bool_]) -> Ranked:
        """The examples of a mask [E], numbered anew in their order."""
        entries = examples[self.owners]
        number = np.cumsum(examples) - 1
        return Ranked(
            self.items[entries],
            number[self.owners[entries]],
            self.ranks[entries],
            self.is_target[entries],
            self.num_targets[examples],
        )


def match_targets(items: Ints, offsets: Ints, targets: Ints, target_offsets: Ints) -> Ranked:
    """Find the targets in ranked lists.

    Args:
        items: Ranked items, flat, best first; no item twice in a list.
        offsets: Where each list starts, and the end, [E + 1].
        targets: Distinct targets, flat.
        target_offsets: Where each example's targets start, and the end, [E + 1].
    """
    lengths, num_targets = np.diff(offsets), np.diff(target_offsets)
    owners = np.repeat(np.arange(len(lengths)), lengths)
    distinct, codes = np.unique(np.concatenate([items, targets]), return_inverse=True)
    keys = owners * len(distinct) + codes[: len(items)]
    wanted = np.repeat(np.arange(len(num_targets)), num_targets) * len(distinct) + codes[len(items) :]
    return Ranked(items, owners, np.arange(len(items)) - offsets[:-1][owners], np.isin(keys, wanted), num_targets)


def count_hits(ranked: Ranked, k: int) -> Ints:
    """Targets among the first k items of each example, [E]."""
    hit = ranked.is_target & (ranked.ranks < k)
    return np.bincount(ranked.owners[hit], minlength=len(ranked.num_targets))


def recall(hits: npt.ArrayLike, num_targets: npt.ArrayLike, k: npt.ArrayLike) -> Floats:
    """Recall@k of each example: hits / min(targets, k)."""
    return np.asarray(hits) / np.minimum(num_targets, k)


def ndcg(ranked: Ranked, k: int) -> Floats:
    """NDCG@k of each example, [E]."""
    discounts = 1 / np.log2(np.arange(k) + 2)
    hit = ranked.is_target & (ranked.ranks < k)
    gain = np.bincount(ranked.owners[hit], discounts[ranked.ranks[hit]], minlength=len(ranked.num_targets))
    ideal: Floats = np.cumsum(discounts)[np.minimum(ranked.num_targets, k) - 1]
    return gain / ideal


def coverage(ranked: Ranked, k: int, num_items: int) -> float:
    """Share of a catalogue of `num_items` that stands in somebody's top k."""
    return len(np.unique(ranked.items[ranked.ranks < k])) / num_items


def popularity_bias(popularity: Floats, target_popularity: Floats, ranked: Ranked, k: int) -> float:
    """Mean popularity quantile of the top-k items minus that of the targets; NaN where all lists are empty.

    Args:
        popularity: Quantile of each list entry, [R].
        target_popularity: Quantile of each target, flat.
        ranked: The lists.
        k: Cut-off.
    """
    shown = popularity[ranked.ranks < k]
    return float(shown.mean() - target_popularity.mean()) if len(shown) else float("nan")
