"""Top-K over the whole catalogue: exact by one matrix product, else H searches, their union, the combined score."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt

from components.exceptions import DataError, MissingInputError
from components.urm.data.request import Floats, Ids
from components.urm.retrieval.exact import flat_vectors, search_exact
from components.urm.retrieval.faiss_kinds import LEAST_DEPTH, gather, keep_known
from components.urm.retrieval.users import Combine, UserVectors

_NOT_FOUND = np.finfo(np.float32).min  # the score that faiss gives a place it cannot fill


def build_index(item_ids: Ids, vectors: Floats) -> faiss.IndexIDMap2:
    """An exact inner-product index of candidate vectors [n, d] that answers with item ids."""
    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    index.add_with_ids(np.ascontiguousarray(vectors, dtype=np.float32), np.ascontiguousarray(item_ids))
    return index


def read_candidates(path: Path) -> faiss.IndexIDMap:
    """The index of a folder with keys.npy and vectors.npy, or of a file written by faiss.

    Raises:
        MissingInputError: There is neither.
    """
    if path.is_file():
        return _as_id_map(path, _map_index(path))
    try:
        keys = np.load(path / "keys.npy", mmap_mode="r", allow_pickle=False)
        vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"candidates {path}",
            expected="keys.npy and vectors.npy, or a faiss index file",
            got=f"no {Path(error.filename).name}",
            remedy="run `urm sft` again",
        ) from None
    return build_index(keys, vectors)


def _map_index(path: Path) -> faiss.Index:
    """An index whose vectors stay in the file: processes that serve one release share them in the page cache."""
    return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)


def _as_id_map(path: Path, index: faiss.Index) -> faiss.IndexIDMap:
    if not isinstance(index, faiss.IndexIDMap):
        raise DataError(
            f"candidates {path}",
            expected="an index that answers with item ids",
            got=type(index).__name__,
            remedy="build the release again",
        )
    return index


def search(
    index: faiss.IndexIDMap,
    users: UserVectors,
    k: int,
    combine: Combine,
    exclude: Sequence[Ids] | None = None,
) -> tuple[list[Ids], list[Floats]]:
    """Best items of each request.

    With an exact index the result is exact. With another, items of a user's history are always scored, and under
    `logsumexp` and `mean` the others are the best of the union of the H searches, with exact scores.

    Args:
        index: Candidates by item id.
        users: n requests.
        k: Items wanted; fewer come back where the catalogue is smaller.
        combine: How H inner products become one score.
        exclude: Item ids that may not appear, one array a request.

    Returns:
        Item ids and scores a request, best first; of equal scores the lower item id comes first.

    Raises:
        DataError: The vectors do not fit the index, or `exclude` does not fit the requests.
    """
    _check(index, users, exclude)
    num_requests, _, width = users.vectors.shape
    if num_requests == 0 or k == 0 or index.ntotal == 0:
        nothing = [np.empty(0, dtype=np.int64)] * num_requests
        return nothing, [np.empty(0, dtype=np.float32)] * num_requests
    catalogue = flat_vectors(index)
    if catalogue is not None:
        return search_exact(*catalogue, users, k, combine, exclude)
    longest = max((len(items) for items in exclude), default=0) if exclude is not None else 0
    depth = min(max(k + longest, LEAST_DEPTH), index.ntotal)
    flat = np.ascontiguousarray(users.vectors.reshape(-1, width), dtype=np.float32)
    scores, items = index.search(flat, depth)
    scores, items = scores.reshape(num_requests, -1), items.reshape(num_requests, -1)
    found_items, found_scores = [], []
    for row, vectors in enumerate(users.vectors):
        found = scores[row] > _NOT_FOUND
        union, best = _union(items[row][found], scores[row][found])
        own, raised = keep_known(index, users.copy_items[row], users.copy_scores[row])
        others = ~np.isin(union, own)
        union = np.concatenate([union[others], own])
        asked = own if combine == "max" else union  # under `max`, a search's own score is the combined one
        combined = _combined(gather(index, asked) @ vectors.T, combine)
        best = np.concatenate([best[others], combined]) if combine == "max" else combined
        best[len(best) - len(own) :] += raised
        if exclude is not None:
            allowed = ~np.isin(union, exclude[row])
            union, best = union[allowed], best[allowed]
        order = np.lexsort((union, -best))[:k]
        found_items.append(union[order])
        found_scores.append(best[order])
    return found_items, found_scores


def _check(index: faiss.IndexIDMap, users: UserVectors, exclude: Sequence[Ids] | None) -> None:
    num_requests, _, width = users.vectors.shape
    excluded = num_requests if exclude is None else len(exclude)
    if width != index.d or excluded != num_requests:
        raise DataError(
            "search",
            expected=f"user vectors of width {index.d} and one exclusion a request",
            got=f"width {width}, {excluded} exclusions for {num_requests} requests",
            remedy="use the model and the candidates of one release",
        )


def _union(items: Ids, scores: Floats) -> tuple[Ids, Floats]:
    """Distinct items in ascending order, each with its best score."""
    order = np.lexsort((-scores, items))
    items, scores = items[order], scores[order]
    first = np.ones(len(items), dtype=bool)
    first[1:] = items[1:] != items[:-1]
    return items[first], scores[first]


def _combined(products: npt.NDArray[np.float32], combine: Combine) -> Floats:
    if combine == "max":
        return np.asarray(products.max(axis=1))
    if combine == "mean":
        return np.asarray(products.mean(axis=1))
    top = products.max(axis=1, keepdims=True)
    return np.asarray(top[:, 0] + np.log(np.exp(products - top).mean(axis=1)), dtype=np.float32)
