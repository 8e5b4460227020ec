"""Exact top-K of a whole catalogue: one matrix product for all requests, block by block of its items.

    n requests · H user vectors each · N items · d width of a vector · w items per request that are rescored

Searching one vector at a time reads the whole catalogue from memory for two operations per number; one product of
hundreds of vectors reads it once. Where the hardware multiplies bfloat16, a first pass in it selects w = k + SPARE
items per request, which are rescored in float32: eight bits cannot rank, but they can select. The scores are exact; an
item can be missing only if SPARE others overtake it by rounding (benchmarks/inference.py measures this). Copy scores
and exclusions are sparse: a row, a place, and a score to add.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from components.device import has_bfloat16
from components.urm.data.request import Floats, Ids
from components.urm.retrieval.users import Combine, UserVectors, combine_scores

SPARE = 100  # items rescored beyond k
BLOCK = 2048  # items per product; its scores dominate the memory of a process
COARSE_FROM = 128  # user vectors; with fewer, converting the catalogue to bfloat16 costs more than it saves
_NOWHERE = -torch.inf


class Pairs(NamedTuple):
    """Pairs of requests and items, with a score to add."""

    rows: torch.Tensor  # requests [p]
    places: torch.Tensor  # items, by their place in the catalogue [p]
    scores: torch.Tensor  # float32 [p]

    def add(self, scores: torch.Tensor, start: int) -> None:
        """Add to scores [n, b] of a block of items that starts at a place."""
        here = (self.places >= start) & (self.places < start + scores.shape[1])
        scores[self.rows[here], self.places[here] - start] += self.scores[here]

    def at(self, places: torch.Tensor, num_items: int) -> torch.Tensor:
        """Scores to add for items by their places [n, w]."""
        if not len(self.rows):
            return torch.zeros(places.shape)
        keys, order = (self.rows * num_items + self.places).sort()
        wanted = torch.arange(len(places))[:, None] * num_items + places
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[found] == wanted, self.scores[order][found], 0.0)


def find_places(item_ids: Ids, wanted: Ids) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Places of some items among the ids of a catalogue, and which of them it has; the others' places mean nothing."""
    order = np.argsort(item_ids, kind="stable")  # fast where they ascend, as they mostly do
    places = order[np.searchsorted(item_ids, wanted, sorter=order).clip(max=len(order) - 1)]
    return places, item_ids[places] == wanted


def find_pairs(item_ids: Ids, items: Sequence[Ids], scores: Sequence[Floats] | None = None) -> Pairs:
    """Pairs of each request and its distinct items in the catalogue [N]; without scores they are excluded."""
    flat = np.concatenate([np.empty(0, dtype=np.int64), *items])
    rows = np.repeat(np.arange(len(items)), [len(mine) for mine in items])
    places, there = find_places(item_ids, flat)
    raised = np.full(len(flat), -np.inf) if scores is None else np.concatenate([np.empty(0), *scores])
    return Pairs(*(torch.from_numpy(part[there]) for part in (rows, places, raised.astype(np.float32))))


class ExactIndex:
    """Candidates in memory or in a mapped file; a search compares all of them."""

    def __init__(self, item_ids: Ids, vectors: Floats, owner: object = None) -> None:
        """Take distinct item ids [N] and their vectors [N, d]; `owner` holds their memory where they are views."""
        self.item_ids = np.ascontiguousarray(item_ids)
        self.vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        self._owner = owner

    @property
    def width(self) -> int:
        """D."""
        return int(self.vectors.shape[1])

    def vectors_of(self, item_ids: Ids) -> Floats:
        """Vectors of some of the items."""
        return self.vectors[find_places(self.item_ids, item_ids)[0]]

    def search(
        self, users: UserVectors, k: int, combine: Combine, exclude: Sequence[Ids] | None, blocked: Ids | None
    ) -> tuple[list[Ids], list[Floats]]:
        """Best items of each request, see `CandidateIndex`."""
        if blocked is not None and len(blocked):
            own = exclude or [np.empty(0, dtype=np.int64)] * len(users.vectors)
            exclude = [np.concatenate([blocked, of_request]) for of_request in own]
        if not has_bfloat16("cpu") or users.vectors.shape[0] * users.vectors.shape[1] < COARSE_FROM:
            return search_blocks(self.item_ids, self._blocks(), users, k, combine, exclude)
        queries, pairs = torch.from_numpy(users.vectors), _find_pairs(self.item_ids, users, exclude)
        with torch.inference_mode():
            scores, places = _best(self._blocks(), queries.bfloat16(), k + SPARE, combine, *pairs)
            again = _score_again(torch.from_numpy(self.vectors), queries, places, combine)
            again = again + pairs[0].at(places, len(self.item_ids))
            scores = torch.where(scores == _NOWHERE, scores, again)  # excluded stays excluded
        return _sort(self.item_ids, scores, places, k)

    def _blocks(self) -> Iterable[torch.Tensor]:
        catalogue = torch.from_numpy(self.vectors)
        return (catalogue[start : start + BLOCK] for start in range(0, len(catalogue), BLOCK))


def search_blocks(
    item_ids: Ids,
    blocks: Iterable[torch.Tensor],
    users: UserVectors,
    k: int,
    combine: Combine,
    exclude: Sequence[Ids] | None = None,
) -> tuple[list[Ids], list[Floats]]:
    """Best items of each of n requests in float32; holds one block [b, d] of the catalogue [N] at a time.

    The catalogue's ids are distinct, its blocks in their order; `exclude` has item ids that may not appear, one array
    per request.

    Returns:
        Item ids and scores of each request, best first; of equal scores the lower item id comes first.
    """
    pairs = _find_pairs(item_ids, users, exclude)
    with torch.inference_mode():
        scores, places = _best(blocks, torch.from_numpy(users.vectors), k, combine, *pairs)
    return _sort(item_ids, scores, places, k)


def _find_pairs(item_ids: Ids, users: UserVectors, exclude: Sequence[Ids] | None) -> tuple[Pairs, Pairs]:
    """Pairs with a copy score, and excluded pairs."""
    return find_pairs(item_ids, users.copy_items, users.copy_scores), find_pairs(item_ids, exclude or [])


def _best(
    blocks: Iterable[torch.Tensor], users: torch.Tensor, wanted: int, combine: Combine, copied: Pairs, excluded: Pairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and places of the best items of each request [n, w], in no order; -inf where there are fewer."""
    num_requests, num_vectors, width = users.shape
    queries = users.reshape(-1, width)
    best, where = torch.empty(num_requests, 0), torch.empty(num_requests, 0, dtype=torch.long)
    start = 0
    for block in blocks:
        products = queries @ block.to(queries.dtype).T  # [n * H, b]
        scores = combine_scores(products.float().view(num_requests, num_vectors, -1).transpose(1, 2), combine)
        copied.add(scores, start)
        scores = scores.nan_to_num_(nan=_NOWHERE, posinf=_NOWHERE)  # a damaged vector is never found
        excluded.add(scores, start)
        best, kept = torch.cat([best, scores], dim=1).topk(min(wanted, best.shape[1] + len(block)), sorted=False)
        where = torch.cat([where, torch.arange(start, start + len(block)).expand(num_requests, -1)], dim=1)
        where = where.gather(1, kept)
        start += len(block)
    return best, where


def _score_again(catalogue: torch.Tensor, users: torch.Tensor, places: torch.Tensor, combine: Combine) -> torch.Tensor:
    """Scores [n, w] of the vectors alone, in float32, at the places [n, w]."""
    rows = [
        combine_scores(catalogue.index_select(0, mine) @ user.T, combine)
        for user, mine in zip(users, places, strict=True)
    ]
    return torch.stack(rows)


def _sort(item_ids: Ids, scores: torch.Tensor, places: torch.Tensor, k: int) -> tuple[list[Ids], list[Floats]]:
    """The k best of each row, best first, of equal scores the lower id."""
    found_items, found_scores = [], []
    for row, mine in zip(scores.numpy(), places.numpy(), strict=True):
        row, ids = row[row > _NOWHERE], item_ids[mine[row > _NOWHERE]]
        order = np.lexsort((ids, -row))[:k]
        found_items.append(ids[order])
        found_scores.append(row[order])
    return found_items, found_scores
