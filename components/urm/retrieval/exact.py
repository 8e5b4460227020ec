"""Exact top-K of a whole catalogue: one matrix product for all requests, block by block of its items.

    n requests · H user vectors each · N items · d width of a vector · w items a request that are scored again

A search of one vector reads the whole catalogue from memory for two operations a number; a product of hundreds of
vectors reads it once. Where the hardware multiplies bfloat16, a first pass in it chooses w = k + SPARE items a request,
and these are scored again in float32: eight bits cannot rank, but they tell what may be among the best. The scores are
exact; an item can be missing only if SPARE others overtake it by rounding alone (benchmarks/inference.py counts them).
Pairs of a request and an item that are treated apart (own, excluded) are sparse: a row, a place, and a score to add.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import faiss
import numpy as np
import numpy.typing as npt
import torch

from components.device import has_bfloat16
from components.urm.data.request import Floats, Ids
from components.urm.retrieval.users import Combine, UserVectors, combine_scores

SPARE = 100  # items scored again beyond the k wanted
BLOCK = 2048  # items of a product; its scores are an instance's largest piece of memory
COARSE_FROM = 128  # user vectors; a product of fewer costs less than turning the catalogue to bfloat16
_NOWHERE = -torch.inf


class Pairs(NamedTuple):
    """Pairs of requests and items, with what the item's score is raised by.

    Attributes:
        rows: Requests [p].
        places: Items, by their place in the catalogue [p].
        scores: float32 [p].
    """

    rows: torch.Tensor
    places: torch.Tensor
    scores: torch.Tensor

    def add(self, scores: torch.Tensor, start: int) -> None:
        """Raise scores [n, b] of a block of items that starts at a place."""
        here = (self.places >= start) & (self.places < start + scores.shape[1])
        scores[self.rows[here], self.places[here] - start] += self.scores[here]

    def at(self, places: torch.Tensor, num_items: int) -> torch.Tensor:
        """What the scores of items, by their places [n, w], are raised by."""
        if not len(self.rows):
            return torch.zeros(places.shape)
        keys, order = (self.rows * num_items + self.places).sort()
        wanted = torch.arange(len(places))[:, None] * num_items + places
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        return torch.where(keys[found] == wanted, self.scores[order][found], 0.0)


def find_pairs(item_ids: Ids, items: Sequence[Ids], scores: Sequence[Floats] | None = None) -> Pairs:
    """Pairs of each request with those of its items that the catalogue has; without scores they are put out of reach.

    Args:
        item_ids: The catalogue [N].
        items: Distinct, one array a request.
        scores: Theirs.
    """
    order = np.argsort(item_ids, kind="stable")  # at once where they ascend, as they mostly do
    flat = np.concatenate([np.empty(0, dtype=np.int64), *items])
    rows = np.repeat(np.arange(len(items)), [len(mine) for mine in items])
    places = order[np.searchsorted(item_ids, flat, sorter=order).clip(max=len(order) - 1)]
    there = item_ids[places] == flat
    raised = np.full(len(flat), -np.inf) if scores is None else np.concatenate([np.empty(0), *scores])
    return Pairs(*(torch.from_numpy(part[there]) for part in (rows, places, raised.astype(np.float32))))


def flat_vectors(index: faiss.IndexIDMap) -> tuple[Ids, Floats] | None:
    """Item ids [N] and vectors [N, d] of an exact index, views of its memory; None for an index of another kind."""
    inner = faiss.downcast_index(index.index)
    if not isinstance(inner, faiss.IndexFlat):
        return None
    ids = faiss.rev_swig_ptr(index.id_map.data(), index.ntotal)
    return ids, faiss.rev_swig_ptr(inner.get_xb(), index.ntotal * inner.d).reshape(index.ntotal, inner.d)


def search_exact(
    item_ids: Ids, vectors: Floats, users: UserVectors, k: int, combine: Combine, exclude: Sequence[Ids] | None
) -> tuple[list[Ids], list[Floats]]:
    """Best items of each request, as `retrieval.search` gives them, under every `combine`.

    Args:
        item_ids: Distinct [N].
        vectors: Theirs [N, d]; may be a memory map.
        users: n requests.
        k: Items wanted.
        combine: How H inner products become one score.
        exclude: Item ids that may not appear, one array a request.
    """
    queries = torch.from_numpy(users.vectors)  # [n, H, d]
    own = find_pairs(item_ids, users.copy_items, users.copy_scores)
    banned = find_pairs(item_ids, exclude) if exclude is not None else None
    coarse = has_bfloat16("cpu") and queries.shape[0] * queries.shape[1] >= COARSE_FROM
    with torch.inference_mode():
        catalogue = torch.from_numpy(vectors)
        scores, places = _best(catalogue, queries, k + SPARE * coarse, combine, own, banned, coarse)
        if coarse:
            again = _score_again(catalogue, queries, places, combine) + own.at(places, len(catalogue))
            scores = torch.where(scores == _NOWHERE, scores, again)  # what is out stays out
    return _sorted(item_ids, np.asarray(scores), np.asarray(places), k)


def _best(
    catalogue: torch.Tensor,
    users: torch.Tensor,
    wanted: int,
    combine: Combine,
    own: Pairs,
    banned: Pairs | None,
    coarse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and places of the best items of each request [n, w], in no order; -inf where there are fewer."""
    num_requests, num_vectors, width = users.shape
    dtype = torch.bfloat16 if coarse else torch.float32
    queries = users.reshape(-1, width).to(dtype)
    best, where = torch.empty(num_requests, 0), torch.empty(num_requests, 0, dtype=torch.long)
    for start, block in _blocks(catalogue):
        products = queries @ block.to(dtype).T  # [n * H, b]
        scores = combine_scores(products.float().view(num_requests, num_vectors, -1).transpose(1, 2), combine)
        own.add(scores, start)
        scores = scores.nan_to_num_(nan=_NOWHERE, posinf=_NOWHERE)  # a damaged vector is nobody's best
        if banned is not None:
            banned.add(scores, start)
        best, kept = torch.cat([best, scores], dim=1).topk(min(wanted, best.shape[1] + len(block)), sorted=False)
        where = torch.cat([where, torch.arange(start, start + len(block)).expand(num_requests, -1)], dim=1)
        where = where.gather(1, kept)
    return best, where


def _blocks(catalogue: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, len(catalogue), BLOCK):
        yield start, catalogue[start : start + BLOCK]


def _score_again(catalogue: torch.Tensor, users: torch.Tensor, places: torch.Tensor, combine: Combine) -> torch.Tensor:
    """Scores [n, w] of the vectors alone, in float32, at the places [n, w]."""
    rows = [
        combine_scores(catalogue.index_select(0, mine) @ user.T, combine)
        for user, mine in zip(users, places, strict=True)
    ]
    return torch.stack(rows)


def _sorted(
    item_ids: Ids, scores: npt.NDArray[np.float32], places: npt.NDArray[np.int64], k: int
) -> tuple[list[Ids], list[Floats]]:
    """The k best of each row, best first, of equal scores the lower id."""
    found_items, found_scores = [], []
    for row, mine in zip(scores, places, strict=True):
        row, ids = row[row > _NOWHERE], item_ids[mine[row > _NOWHERE]]
        order = np.lexsort((ids, -row))[:k]
        found_items.append(ids[order])
        found_scores.append(row[order])
    return found_items, found_scores
