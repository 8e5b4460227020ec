"""Item-to-item similarity: shrunken cosine of what goes together, or follows, in the training period.

    sim(i, j) = n_ij / (sqrt(n_i · n_j) + shrinkage)

Where users have baskets, n_ij counts those that hold both. Where they have sequences, every later item j of a user
counts GAP_DECAY^(gap - 1) for i, and every earlier one `backward` times that. An item is its own neighbour, so that
repeats count.

What grows with the log is narrow or in files: a log takes 8 bytes per event while it is read, and 8 per distinct item
of a basket then; what goes together is counted by blocks of items, and mapped from files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.compute as pc
import pyarrow.dataset as ds
import scipy.sparse as sp

from components.config import SplitConfig

Ints = npt.NDArray[np.int64]

GAP_DECAY = 0.8
SEQUENCE_REACH = 50

AT_ONCE = 1 << 24  # events or pairs of items that are worked on together


@dataclass(frozen=True)
class Baskets:
    """What users had together, by user and time."""

    matrix: sp.csr_array  # binary baskets × catalogue
    users: Ints  # number of each basket's user, ascending; a user's baskets from the oldest to the newest
    reach: int  # how many baskets later an item still counts as following; 0: only what is in one basket goes together


def read_baskets(events: Path, item_ids: Ints, split: SplitConfig, until: datetime) -> Baskets:
    """What a user had in one window of the time before `until`; leave-one-out has one event per window.

    Items that are not among the ascending `item_ids` are left out; windows are aligned to the first training cut.
    """
    codes, num_windows = _code_events(events, item_ids, split, until)
    return _group(codes, num_windows, len(item_ids), SEQUENCE_REACH if split.kind == "leave_one_out" else 0)


def _code_events(events: Path, item_ids: Ints, split: SplitConfig, until: datetime) -> tuple[Ints, int]:
    """Events as (user · windows + window) · items + item, and the number of windows.

    A window lasts a day at least, so that the codes of any shop's log have less than 63 bits.
    """
    start = np.datetime64(split.train_start.astimezone(UTC).replace(tzinfo=None), "us")
    log, before = ds.dataset(events, partitioning="hive"), pc.field("ts") < pc.scalar(until)

    def windows_of(times: npt.NDArray[Any]) -> Ints:
        return np.floor((times - start) / np.timedelta64(split.window)).astype(np.int64)

    number, first, last = 0, 0, 0
    for batch in log.to_batches(columns=["ts"], filter=before):
        if batch.num_rows:
            times = batch.column("ts").to_numpy()
            low, high = windows_of(np.array([times.min(), times.max()]))
            number, first, last = number + len(times), min(first, int(low)), max(last, int(high))
    num_windows = last - first + 1
    numbers: dict[str, int] = {}  # of the users, in the order in which they come first
    codes, filled = np.empty(number, np.int64), 0
    for batch in log.to_batches(columns=["user_id", "item_id", "ts"], filter=before):
        named = pc.dictionary_encode(batch.column("user_id"))
        users = np.array([numbers.setdefault(name, len(numbers)) for name in named.dictionary.to_pylist()], np.int64)
        bought = batch.column("item_id").to_numpy()
        places = np.minimum(np.searchsorted(item_ids, bought), len(item_ids) - 1)
        windows = windows_of(batch.column("ts").to_numpy()) - first
        coded = (users[named.indices.to_numpy()] * num_windows + windows) * len(item_ids) + places
        coded = coded[item_ids[places] == bought]
        codes[filled : filled + len(coded)] = coded
        filled += len(coded)
    return codes[:filled], num_windows


def _group(codes: Ints, num_windows: int, num_items: int, reach: int) -> Baskets:
    """Baskets of coded events; the codes are overwritten."""
    codes.sort()
    codes = _drop_repeats(codes)
    items = np.empty(len(codes), np.int32)
    np.remainder(codes, num_items, out=items, casting="unsafe")
    codes //= num_items
    starts = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])[: len(codes)])
    offsets = np.append(starts, len(codes))
    matrix = sp.csr_array((np.ones(len(items), np.float32), items, offsets), shape=(len(starts), num_items))
    return Baskets(matrix, codes[starts] // num_windows, reach)


def _drop_repeats(codes: Ints) -> Ints:
    """The distinct ones of ascending codes, moved to the front of the same memory."""
    kept, last = 0, -1
    for start in range(0, len(codes), AT_ONCE):
        part = codes[start : start + AT_ONCE]
        distinct = part[np.concatenate([part[:1] != last, part[1:] != part[:-1]])]
        last = part[-1]
        codes[kept : kept + len(distinct)] = distinct
        kept += len(distinct)
    return codes[:kept]


def count_pairs(baskets: Baskets, backward: float, folder: Path, at_once: int = AT_ONCE) -> sp.csr_array:
    """n_ij, how often j came with i or after it, shape [catalogue, catalogue]; the diagonal is n_ii = n_i.

    Where baskets reach forward, j *before* i counts `backward`; 1 makes n symmetric. The counts are made for so many
    items together as have some `at_once` pairs, and lie in files in `folder` that end with the matrix.
    """
    matrix = baskets.matrix
    of_items = sp.csr_array(matrix.T)
    # More than an item's pairs: of every of its baskets, all items.
    pairs = of_items @ np.diff(matrix.indptr).astype(np.float32)
    _, sizes = np.unique(baskets.users, return_counts=True)
    gaps = min(baskets.reach, int(sizes.max(initial=1)) - 1)
    pairs *= max(2 * gaps, 1)
    counts = np.diff(of_items.indptr).astype(np.float32)

    def count(first: int, last: int) -> sp.csr_array:
        part = of_items[first:last]
        if baskets.reach == 0:
            return sp.csr_array(part @ matrix)
        found = sp.csr_array(part.shape[:1] + matrix.shape[1:], dtype=np.float32)
        for gap in range(1, gaps + 1):
            decay = np.float32(GAP_DECAY ** (gap - 1))
            later, earlier = (sp.csr_array(_move(part, baskets.users, by) @ matrix) * decay for by in (gap, -gap))
            found = found + later + np.float32(backward) * earlier
        own = (found.diagonal(first), counts[first:last])
        diagonals = [sp.diags_array(values, offsets=first, shape=found.shape) for values in own]
        return sp.csr_array(found - diagonals[0] + diagonals[1])

    blocks = (count(first, last) for first, last in _cut(pairs, at_once))
    return _map_rows(blocks, matrix.shape[1], np.int32 if pairs.sum(dtype=np.float64) < 2**31 else np.int64, folder)


def _move(of_items: sp.csr_array, users: Ints, by: int) -> sp.csr_array:
    """Items × the baskets that are `by` later than one with the item, and of the same user."""
    moved = of_items.indices + by
    kept = (moved >= 0) & (moved < len(users))
    kept[kept] = users[moved[kept]] == users[of_items.indices[kept]]
    offsets = np.concatenate([[0], np.cumsum(kept)])[of_items.indptr]
    return sp.csr_array((of_items.data[kept], moved[kept], offsets), shape=of_items.shape)


def shrunken_cosine(pairs: sp.csr_array, shrinkage: float, folder: Path, at_once: int = AT_ONCE) -> sp.csr_array:
    """Similarity of co-occurring items, shape [catalogue, catalogue], its values in a file in `folder`."""
    roots = np.sqrt(pairs.diagonal()).astype(np.float32)
    with tempfile.TemporaryFile(dir=folder) as file:
        for first, last in _cut(np.diff(pairs.indptr), at_once):
            part = slice(pairs.indptr[first], pairs.indptr[last])
            of_rows = np.repeat(roots[first:last], np.diff(pairs.indptr[first : last + 1]))
            similarity = pairs.data[part] / (of_rows * roots[pairs.indices[part]] + np.float32(shrinkage))
            file.write(similarity.data)
        return sp.csr_array((_map(file, np.float32), pairs.indices, pairs.indptr), shape=pairs.shape)


def _cut(sizes: npt.NDArray[Any], at_once: int) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of blocks of rows that together have some `at_once`; a larger row stands alone."""
    blocks = np.cumsum(sizes, dtype=np.float64) // at_once
    ends = [*(np.flatnonzero(np.diff(blocks)) + 1), len(sizes)]
    yield from zip([0, *ends[:-1]], ends, strict=True)


def _map_rows(
    blocks: Iterable[sp.csr_array], width: int, index_type: type[np.signedinteger], folder: Path
) -> sp.csr_array:
    """Blocks of rows under each other, columns ascending, mapped from files that have no name any more."""
    lengths = [np.zeros(1, index_type)]
    with tempfile.TemporaryFile(dir=folder) as columns, tempfile.TemporaryFile(dir=folder) as values:
        for block in blocks:
            block.sort_indices()
            columns.write(block.indices.astype(index_type, copy=False).data)
            values.write(block.data.data)
            lengths.append(np.diff(block.indptr))
        offsets = np.cumsum(np.concatenate(lengths), dtype=index_type)
        mapped = (_map(values, np.float32), _map(columns, index_type), offsets)
        return sp.csr_array(mapped, shape=(len(offsets) - 1, width))


def _map(file: Any, kind: type[np.generic]) -> npt.NDArray[Any]:
    """What was written to a file; an empty one cannot be mapped."""
    file.flush()
    return np.memmap(file, kind, mode="r") if file.tell() else np.empty(0, kind)
