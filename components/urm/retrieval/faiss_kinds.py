"""Kinds of candidate index, chosen by the size of the catalogue (ADR 16).

    exact      every item compared, in 32 bits
    ivf_sq8    items of the nearest cells, by leading principal components in 8 bits; the best rescored in 16 bits
    pq         the same by product codes of 4 bits, scanned in registers; the best rescored in 4 bits

    n items · d width of an item's vector · r leading principal components

Inner products of vectors of any length need care in two places. Cells come from Euclidean k-means and are ranked by the
inner product with their centre, which is the mean score of the cell: faiss's default, spherical k-means, ignores the
length of the vectors, which encodes popularity here. And the projection keeps the mean: centring the query would
subtract μ · v from the score of item v.
"""

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np
import numpy.typing as npt
import torch

from components.exceptions import DataError
from components.urm.data.request import Floats, Ids
from components.urm.retrieval.exact import BLOCK as EXACT_BLOCK
from components.urm.retrieval.exact import ExactIndex, search_blocks
from components.urm.retrieval.users import Combine, UserVectors, combine_scores

Kind = Literal["exact", "ivf_sq8", "pq"]
KINDS: tuple[Kind, ...] = ("exact", "ivf_sq8", "pq")  # most exact first
EXACT_UP_TO, IVF_SQ8_UP_TO = 100_000, 2_000_000  # items

BLOCK = 50_000  # items added at a time
SAMPLES_PER_CELL = 50  # for k-means
KMEANS_ROUNDS = 10
MIN_DEPTH = 350  # of every search of an approximate index
_NOT_FOUND = np.finfo(np.float32).min  # faiss's score of an empty place
Blocks = Iterable[Floats]
Places = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Shape:
    """Constants of an approximate kind; measured by benchmarks/index.py."""

    components: int  # r, leading principal components in the cells
    probes: float  # share of the cells searched
    factor: int  # items rescored, as a multiple of those asked for; more where items are more similar
    again: int  # type of faiss's scalar quantizer for the whole vectors that rescore the best


SHAPES: dict[Kind, Shape] = {
    "ivf_sq8": Shape(components=256, probes=1 / 4, factor=20, again=faiss.ScalarQuantizer.QT_fp16),
    "pq": Shape(components=256, probes=1 / 4, factor=8, again=faiss.ScalarQuantizer.QT_4bit),
}


def choose_kind(num_items: int) -> Kind:
    """The kind for a catalogue of this size."""
    if num_items <= EXACT_UP_TO:
        return "exact"
    return "ivf_sq8" if num_items <= IVF_SQ8_UP_TO else "pq"


def count_cells(num_items: int) -> int:
    """Cells of an approximate index: the power of two nearest to 4 √n, with at least 39 items per cell."""
    return 1 << max(round(math.log2(min(4 * math.sqrt(num_items), num_items / 39))), 0)


def count_samples(num_items: int) -> int:
    """Number of items that train an approximate index."""
    return min(num_items, max(SAMPLES_PER_CELL * count_cells(num_items), 10_000))


class FaissIndex:
    """Candidates in an approximate index of faiss."""

    def __init__(self, index: faiss.IndexIDMap, owner: object = None) -> None:
        """Take an index whose ids ascend, and what must live as long as it does."""
        self.inner = index
        self._owner = owner
        self.item_ids: Ids = _view_ids(index)

    @property
    def width(self) -> int:
        """D."""
        return int(self.inner.d)

    def vectors_of(self, item_ids: Ids) -> Floats:
        """Vectors [n, d] of some of the items, as the index keeps them for rescoring."""
        vectors: Floats = self.inner.index.reconstruct_batch(np.searchsorted(self.item_ids, item_ids))
        return vectors

    def search(
        self, users: UserVectors, k: int, combine: Combine, exclude: Sequence[Ids] | None, blocked: Ids | None
    ) -> tuple[list[Ids], list[Floats]]:
        """Best items of each request, see `CandidateIndex`: H searches, their union, the combined score.

        Items of a user's history are always scored. Under `logsumexp` and `mean` the others are the best of the union
        of the H searches, with exact scores. Where items are blocked, what is left is searched as a catalogue of its
        size would be: all of it, or its cells without the others, and all cells where those searched have too few.
        """
        if blocked is None or not len(blocked):
            return self._search_cells(users, k, combine, exclude, None)
        left = np.ones(len(self.item_ids), dtype=bool)
        places, there = self._find(blocked)
        left[places[there]] = False
        if left.sum() <= EXACT_UP_TO:
            ids = self.item_ids[left]
            blocks = (
                torch.from_numpy(self.vectors_of(ids[start : start + EXACT_BLOCK]))
                for start in range(0, len(ids), EXACT_BLOCK)
            )
            return search_blocks(ids, blocks, users, k, combine, exclude)
        items, scores = self._search_cells(users, k, combine, exclude, left)
        own = [0] * len(items) if exclude is None else [len(of_request) for of_request in exclude]
        short = [row for row, found in enumerate(items) if len(found) < min(k, int(left.sum()) - own[row])]
        if short:
            excluded = None if exclude is None else [exclude[row] for row in short]
            again = self._search_cells(users.select(short), k, combine, excluded, left, all_cells=True)
            for row, more, theirs in zip(short, *again, strict=True):
                items[row], scores[row] = more, theirs
        return items, scores

    def _search_cells(
        self,
        users: UserVectors,
        k: int,
        combine: Combine,
        exclude: Sequence[Ids] | None,
        left: Places | None,
        all_cells: bool = False,
    ) -> tuple[list[Ids], list[Floats]]:
        """Best items of each request in the cells of the index; `left` are those that any may get [N], None: all."""
        num_requests, _, width = users.vectors.shape
        longest = max((len(items) for items in exclude), default=0) if exclude is not None else 0
        depth = min(max(k + longest, MIN_DEPTH), len(self.item_ids))
        flat = np.ascontiguousarray(users.vectors.reshape(-1, width), dtype=np.float32)
        scores, places = self._search_places(flat, depth, left, all_cells)
        scores, items = scores.reshape(num_requests, -1), self.item_ids[places].reshape(num_requests, -1)
        found_items, found_scores = [], []
        for row, vectors in enumerate(users.vectors):
            found = scores[row] > _NOT_FOUND
            union, best = _union(items[row][found], scores[row][found])
            copied, raised = self._keep_known(users.copy_items[row], users.copy_scores[row], left)
            others = ~np.isin(union, copied)
            union = np.concatenate([union[others], copied])
            asked = copied if combine == "max" else union  # under `max`, the best score found is the combined one
            combined = combine_scores(torch.from_numpy(self.vectors_of(asked) @ vectors.T), combine).numpy()
            best = np.concatenate([best[others], combined]) if combine == "max" else combined
            best[len(best) - len(copied) :] += raised
            if exclude is not None:
                allowed = ~np.isin(union, exclude[row])
                union, best = union[allowed], best[allowed]
            order = np.lexsort((union, -best))[:k]
            found_items.append(union[order])
            found_scores.append(best[order])
        return found_items, found_scores

    def _search_places(
        self, queries: Floats, depth: int, left: Places | None, all_cells: bool
    ) -> tuple[Floats, npt.NDArray[np.int64]]:
        """Scores and places of the best items of each query; a place that nothing was found for means nothing."""
        if left is None:
            scores, places = self.inner.index.search(queries, depth)
            return scores, places
        kinds: Any = faiss  # typed without the arguments that its classes take by name
        refined = kinds.downcast_index(self.inner.index)
        cells = kinds.extract_index_ivf(refined)
        bits = np.packbits(left, bitorder="little")  # of which the selector makes no copy
        of_cells = kinds.SearchParametersIVF(
            sel=kinds.IDSelectorBitmap(bits), nprobe=cells.nlist if all_cells else cells.nprobe
        )
        how = kinds.IndexRefineSearchParameters(
            k_factor=refined.k_factor, base_index_params=kinds.SearchParametersPreTransform(index_params=of_cells)
        )
        scores, places = refined.search(queries, depth, params=how)
        return scores, places

    def _keep_known(self, item_ids: Ids, scores: Floats, left: Places | None = None) -> tuple[Ids, Floats]:
        """Items that the index has, and that may be found, with their scores."""
        places, known = self._find(item_ids)
        if left is not None:
            known &= left[places]
        return item_ids[known], scores[known]

    def _find(self, item_ids: Ids) -> tuple[npt.NDArray[np.int64], Places]:
        """Places of some items, and which of them the index has; the others' places mean nothing."""
        places = np.searchsorted(self.item_ids, item_ids).clip(max=len(self.item_ids) - 1)
        return places, self.item_ids[places] == item_ids


def build_approximate(kind: Kind, item_ids: Ids, blocks: Callable[[], Blocks], seed: int, folder: Path) -> FaissIndex:
    """An approximate inner-product index over ascending item ids [n], of any of KINDS but `exact`.

    `blocks` yields the vectors of all items in blocks, in the order of the ids; called twice. The seed is that of
    k-means and rotation; equal input gives an equal index. The codes for rescoring, its largest part, are mapped from a
    file without a name in `folder`.

    Raises:
        DataError: The ids are not ascending, or do not match the vectors one to one.
    """
    shape = SHAPES[kind]
    sample = _draw_sample(item_ids, blocks(), seed)
    project = _train_projection(sample, shape.components)
    again = faiss.IndexScalarQuantizer(sample.shape[1], shape.again, faiss.METRIC_INNER_PRODUCT)
    again.train(sample)
    projected = project.apply(sample)
    del sample  # before k-means: it can take gigabytes
    cells = _train_cells(kind, projected, len(item_ids), seed)
    refined = faiss.IndexRefine(faiss.IndexPreTransform(project, cells), again)
    refined.k_factor = shape.factor
    index = faiss.IndexIDMap(refined)
    with tempfile.TemporaryFile(dir=folder) as file:
        for block in blocks():
            vectors = np.ascontiguousarray(block, dtype=np.float32)
            refined.base_index.add(vectors)
            file.write(again.sa_encode(vectors).tobytes())
        file.flush()
        codes = np.memmap(file, np.uint8, "r")
    kept: Any = again.codes  # typed as another vector
    again.codes = type(kept).create_view(faiss.swig_ptr(codes), codes.size, kept.owner)
    again.ntotal = refined.ntotal = index.ntotal = len(item_ids)
    faiss.copy_array_to_vector(np.ascontiguousarray(item_ids, dtype=np.int64), index.id_map)
    cells.quantizer.metric_type = faiss.METRIC_INNER_PRODUCT  # items are in their nearest cells: now rank cells
    return FaissIndex(index, owner=codes)


def save_index(index: ExactIndex | FaissIndex, path: Path) -> None:
    """Write an index to a file of faiss."""
    if isinstance(index, FaissIndex):
        faiss.write_index(index.inner, str(path))
        return
    flat = faiss.IndexIDMap2(faiss.IndexFlatIP(index.width))
    flat.add_with_ids(index.vectors, index.item_ids)
    faiss.write_index(flat, str(path))


def load_index(path: Path) -> ExactIndex | FaissIndex:
    """An index whose vectors stay in the file: processes that serve one release share them in the page cache.

    Raises:
        DataError: The index does not answer with item ids.
    """
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if not isinstance(index, faiss.IndexIDMap):
        raise DataError(
            f"candidates {path}",
            expected="an index that answers with item ids",
            got=type(index).__name__,
            remedy="build the release again",
        )
    inner = faiss.downcast_index(index.index)
    if not isinstance(inner, faiss.IndexFlat):
        return FaissIndex(index)
    vectors = faiss.rev_swig_ptr(inner.get_xb(), index.ntotal * inner.d).reshape(index.ntotal, inner.d)
    return ExactIndex(_view_ids(index), vectors, owner=index)


def _view_ids(index: faiss.IndexIDMap) -> Ids:
    """The index's own ids, not copied."""
    return faiss.rev_swig_ptr(index.id_map.data(), index.ntotal)


def _union(items: Ids, scores: Floats) -> tuple[Ids, Floats]:
    """Distinct items in ascending order, each with its best score."""
    order = np.lexsort((-scores, items))
    items, scores = items[order], scores[order]
    first = np.ones(len(items), dtype=bool)
    first[1:] = items[1:] != items[:-1]
    return items[first], scores[first]


def _draw_sample(item_ids: Ids, blocks: Blocks, seed: int) -> Floats:
    """Training vectors, drawn without replacement."""
    num_items = len(item_ids)
    chosen = np.sort(np.random.default_rng(seed).choice(num_items, count_samples(num_items), replace=False))
    sample = np.empty((0, 0), dtype=np.float32)
    start = 0
    for block in blocks:
        if not start:
            sample = np.empty((len(chosen), block.shape[1]), dtype=np.float32)  # once: it can take gigabytes
        low, high = np.searchsorted(chosen, [start, start + len(block)])
        sample[low:high] = block[chosen[low:high] - start]
        start += len(block)
    if start != num_items or (np.diff(item_ids) <= 0).any():
        raise DataError(
            "index",
            expected="one vector per item and ascending item ids",
            got=f"{start} vectors and {num_items} ids",
            remedy="sort vectors and ids",
        )
    return sample


def _train_projection(sample: Floats, components: int) -> faiss.PCAMatrix:
    """The leading components, rotated at random so that each carries equal variance; an even number of them."""
    project = faiss.PCAMatrix(sample.shape[1], min(components, min(sample.shape) // 2 * 2), 0, True)
    project.train(sample)
    project.have_bias = False
    return project


def _train_cells(kind: Kind, projected: Floats, num_items: int, seed: int) -> faiss.IndexIVF:
    num_cells, width = count_cells(num_items), projected.shape[1]
    means = faiss.Kmeans(width, num_cells, niter=KMEANS_ROUNDS, seed=seed, max_points_per_centroid=SAMPLES_PER_CELL)
    means.train(projected)
    nearest = faiss.IndexFlat(width, faiss.METRIC_L2)
    nearest.add(np.asarray(means.centroids))
    cells: faiss.IndexIVF
    if kind == "ivf_sq8":
        cells = faiss.IndexIVFScalarQuantizer(
            nearest, width, num_cells, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT, True
        )
    else:
        cells = faiss.IndexIVFPQFastScan(nearest, width, num_cells, width // 2, 4, faiss.METRIC_INNER_PRODUCT)
        cells.by_residual = True
    cells.train(projected)
    cells.nprobe = max(round(num_cells * SHAPES[kind].probes), 1)
    return cells
