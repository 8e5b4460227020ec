"""The k best of all items by brute force, block by block: the reference for approximate indexes.

E requests · H user vectors · d their width · B items of a block
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from components.urm.data.request import Floats, Ids
from components.urm.retrieval.exact import search_blocks
from components.urm.retrieval.users import Combine, UserVectors


def top_of_all(
    item_ids: Ids,
    blocks: Iterable[Floats],
    users: UserVectors,
    k: int,
    combine: Combine,
    exclude: Sequence[Ids] | None = None,
) -> list[Ids]:
    """Best items of each of E requests, exact under any combination; holds one block [B, d] of the catalogue at a time.

    Fewer than k where the catalogue is smaller. `exclude` has item ids that may not appear, one array per request.
    """
    copies = (torch.from_numpy(np.array(block, dtype=np.float32)) for block in blocks)  # a block may be read-only
    return search_blocks(item_ids, copies, users, k, combine, exclude)[0]


def recall_of(found: Sequence[Ids], exact: Sequence[Ids]) -> float:
    """Mean share of the exact items that were found; a request without exact items counts as 1."""
    return float(
        np.mean([np.isin(want, got).mean() if len(want) else 1.0 for got, want in zip(found, exact, strict=True)])
    )
