"""The k best of all items by brute force, block by block: what an approximate index is measured against.

E requests · H user vectors · d their width · B items of a block
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from components.urm.data.request import Floats, Ids
from components.urm.retrieval.exact import find_pairs
from components.urm.retrieval.users import Combine, UserVectors, combine_scores


def top_of_all(
    item_ids: Ids,
    blocks: Iterable[Floats],
    users: UserVectors,
    k: int,
    combine: Combine,
    exclude: Sequence[Ids] | None = None,
) -> list[Ids]:
    """Best items of each request, exact under any combination; holds one block of the catalogue at a time.

    Args:
        item_ids: All ids [n].
        blocks: Their vectors [B, d], in that order.
        users: E requests.
        k: Items wanted; fewer where the catalogue is smaller.
        combine: How H inner products become one score.
        exclude: Item ids that may not appear, one array a request.
    """
    num_requests, num_vectors, width = users.vectors.shape
    queries = torch.from_numpy(np.ascontiguousarray(users.vectors.reshape(-1, width)))
    own = find_pairs(item_ids, users.copy_items, users.copy_scores)
    banned = find_pairs(item_ids, exclude or [])
    best = torch.empty(num_requests, 0)
    places = torch.empty(num_requests, 0, dtype=torch.int64)
    start = 0
    for block in blocks:
        products = queries @ torch.from_numpy(np.array(block, dtype=np.float32)).T  # [E·H, B]
        scores = combine_scores(products.view(num_requests, num_vectors, -1).transpose(1, 2), combine)  # [E, B]
        own.add(scores, start)
        banned.add(scores, start)
        here = torch.arange(start, start + len(block)).expand_as(scores)
        best, order = torch.cat([best, scores], dim=1).topk(min(k, best.shape[1] + len(block)))
        places = torch.cat([places, here], dim=1).gather(1, order)
        start += len(block)
    return [item_ids[row[kept].numpy()] for row, kept in zip(places, best > -torch.inf, strict=True)]


def recall_of(found: Sequence[Ids], exact: Sequence[Ids]) -> float:
    """Mean share of the exact items that were found; a request without any counts as answered."""
    return float(
        np.mean([np.isin(want, got).mean() if len(want) else 1.0 for got, want in zip(found, exact, strict=True)])
    )
