"""The item table: a memory-mapped hash table from item id to row, and one array of vectors per modality.

    keys.npy              int64 [n]      item ids, in row order
    slots.npy             int64 [2^b]    open addressing: row of the key that landed here, or -1
    <name>.npy            float16 [n, d] vectors of a modality; zero where absent
    <name>.present.npy    bool [n]       whether the item has a vector of that modality
    <name>.words.npy      uint64 [w]    of a modality made of words: hashes of these words, sorted
    <name>.names.npy      uint64 [d]    of a modality with a name for each column: hashes of these names

Nothing is rebuilt when a table is opened: the files *are* the hash table, so that any number of processes of a
machine share one copy in the page cache. A table never changes once written, so that `link_table` may give its files a
second folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from components.addresses import link_file
from components.exceptions import DataError, MissingInputError
from components.items.codes import Words
from components.items.hashing import mix_bits

Keys = npt.NDArray[np.int64]
Vectors = npt.NDArray[np.float16]

# Behind a modality's name: its vectors for items of a history, where they differ from those of candidates.
HISTORY_ROLE = "_history"
POPULARITY = "popularity"  # logarithms of counts of baskets, see popularity.py
Present = npt.NDArray[np.bool_]

_Scalar = TypeVar("_Scalar", bound=np.generic)

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_RESERVED = ("keys", "slots")
_WORDS, _NAMES = ".words.npy", ".names.npy"


class Modality(NamedTuple):
    """Vectors of one modality, in row order."""

    vectors: Vectors  # float16 [n, d], read-only; zero where absent
    present: Present  # bool [n], read-only


@dataclass(frozen=True)
class ItemTable:
    """Item ids to rows, rows to vectors. Made by `open`; every array is a read-only memory map."""

    keys: Keys  # item ids, int64 [n], in row order
    modalities: Mapping[str, Modality]  # name → vectors and presence
    _slots: Keys
    words: Mapping[str, Words]  # name of a modality made of words → hashes of its words, sorted; empty in older tables
    names: Mapping[str, Words]  # name of a modality → hash of the name of each column [d]; empty in older tables

    @classmethod
    def open(cls, folder: str | Path) -> ItemTable:
        """Map the files of a table.

        Raises:
            MissingInputError: The folder holds no item table.
            DataError: A file is damaged, or files do not belong together.
        """
        folder = Path(folder)
        keys, slots = _map(folder, "keys", np.int64, 1), _map(folder, "slots", np.int64, 1)
        if len(slots) < 2 * len(keys) or len(slots) & (len(slots) - 1):
            raise _damaged(folder / "slots.npy", f"a power of two of at least {2 * len(keys)} slots", len(slots))
        modalities = {}
        for path in sorted(folder.glob("*.present.npy")):
            name = path.name.removesuffix(".present.npy")
            modality = Modality(_map(folder, name, np.float16, 2), _map(folder, f"{name}.present", np.bool_, 1))
            for part, array in zip((name, f"{name}.present"), modality, strict=True):
                if len(array) != len(keys):
                    raise _damaged(folder / f"{part}.npy", f"{len(keys)} rows as in keys.npy", len(array))
            modalities[name] = modality
        words, names = _map_hashes(folder, _WORDS), _map_hashes(folder, _NAMES)
        for name, hashes in names.items():
            width = modalities[name].vectors.shape[1] if name in modalities else 0
            if len(hashes) != width:
                raise _damaged(folder / f"{name}{_NAMES}", f"{width} names as in {name}.npy", len(hashes))
        return cls(keys, MappingProxyType(modalities), slots, words, names)

    def __len__(self) -> int:
        """Number of items."""
        return len(self.keys)

    def rows(self, item_ids: npt.ArrayLike) -> Keys:
        """Rows of item ids, int64 of the same length; -1 where the table has no such item."""
        wanted = np.atleast_1d(np.asarray(item_ids, dtype=np.int64))
        rows = np.full(len(wanted), -1, dtype=np.int64)
        mask = len(self._slots) - 1
        open_ = np.arange(len(wanted))  # positions whose probe has not ended
        slots = _home_slots(wanted, mask)
        while len(open_):
            found = self._slots[slots]
            taken = found >= 0  # an empty slot ends the probe: the key is not there
            open_, slots, found = open_[taken], slots[taken], found[taken]
            hit = self.keys[found] == wanted[open_]
            rows[open_[hit]] = found[hit]
            open_, slots = open_[~hit], (slots[~hit] + 1) & mask
        return rows

    def gather(self, name: str, item_ids: npt.ArrayLike) -> tuple[npt.NDArray[np.float32], Present]:
        """Vectors of a modality for item ids [m]; repeats are fine.

        Returns:
            vectors float32 [m, d], zero where the item or its vector is absent, and present bool [m].

        Raises:
            DataError: The table has no such modality.
        """
        try:
            modality = self.modalities[name]
        except KeyError:
            raise DataError(
                "item table",
                expected=f"modality {name!r}",
                got=", ".join(self.modalities) or "none",
                remedy="set urm.modalities to what the encode stage writes",
            ) from None
        rows = self.rows(item_ids)
        present = rows >= 0
        present[present] = modality.present[rows[present]]
        vectors = np.zeros((len(rows), modality.vectors.shape[1]), dtype=np.float32)
        vectors[present] = modality.vectors[rows[present]]
        return vectors, present


def write_item_table(
    folder: str | Path,
    keys: npt.ArrayLike,
    modalities: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]],
    words: Mapping[str, Words] | None = None,
    names: Mapping[str, Words] | None = None,
) -> None:
    """Write a new table.

    Args:
        folder: Created if missing; must hold no table yet.
        keys: Distinct item ids, int64 [n].
        modalities: Name → (vectors [n, d], present bool [n]); stored as float16.
        words: Name of a modality made of words → its words, see `codes.list_words`.
        names: Name of a modality → the names of its columns [d], see `codes.name_hashes`.

    Raises:
        DataError: A key repeats, shapes disagree, a vector is not finite in float16, or a table is there already.
    """
    folder = _new_folder(folder)
    ids = np.ascontiguousarray(keys, dtype=np.int64)
    slots = _build_slots(ids)
    # A check makes a copy in 16 bits. All checks come before the first file, and only one copy is there at a time.
    for name, arrays in modalities.items():
        _check_modality(name, len(ids), *arrays)
    for name, arrays in modalities.items():
        _save_modality(folder, name, _check_modality(name, len(ids), *arrays))
    for suffix, tables in ((_WORDS, words), (_NAMES, names)):
        for name, hashes in (tables or {}).items():
            np.save(folder / f"{name}{suffix}", hashes)
    np.save(folder / "slots.npy", slots)
    np.save(folder / "keys.npy", ids)  # the last: without it there is no table


def link_table(source: str | Path, target: str | Path) -> ItemTable:
    """Give a table a second folder: hard links where the file system can, copies otherwise.

    Raises:
        MissingInputError: The source holds no item table.
        DataError: A file of the table is damaged, or the target holds a table already.
    """
    ItemTable.open(source)
    target = _new_folder(target)
    for path in sorted(Path(source).glob("*.npy")):
        link_file(path, target / path.name)
    return ItemTable.open(target)


def _home_slots(keys: Keys, mask: int) -> Keys:
    """Where the probe of each key starts."""
    return (mix_bits(keys.view(np.uint64)) & np.uint64(mask)).astype(np.int64)


def _build_slots(keys: Keys) -> Keys:
    """Linear probing, all keys at once: in each round every pending key tries one slot, and losers move on."""
    if keys.ndim != 1:
        raise DataError("item ids", expected="one dimension", got=f"{keys.ndim}", remedy="pass a flat array")
    _refuse_duplicates(keys)
    slots = np.full(1 << max(1, (2 * len(keys) - 1).bit_length()), -1, dtype=np.int64)  # load factor ≤ 0.5
    mask = len(slots) - 1
    pending = np.arange(len(keys))
    tried = _home_slots(keys, mask)
    while len(pending):
        free = slots[tried] < 0
        slots[tried[free]] = pending[free]  # of several claims on one slot, one wins
        lost = slots[tried] != pending
        pending, tried = pending[lost], (tried[lost] + 1) & mask
    return slots


def _refuse_duplicates(keys: Keys) -> None:
    ordered = np.sort(keys)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated):
        raise DataError(
            "item ids",
            expected="each once",
            got=f"{repeated[0]} twice or more ({len(repeated)} repeats in all)",
            remedy="keep one row per item",
        )


def _check_modality(name: str, num_items: int, vectors: npt.ArrayLike, present: npt.ArrayLike) -> Modality:
    subject = f"modality {name!r}"
    if not _NAME.fullmatch(name) or name in _RESERVED:
        raise DataError(
            subject,
            expected="a name of lower-case letters, digits and underscores other than keys and slots",
            got=repr(name),
            remedy="choose another name",
        )
    values, mask = np.asarray(vectors), np.asarray(present, dtype=bool)
    if values.ndim != 2 or len(values) != num_items or mask.shape != (num_items,):
        raise DataError(
            subject,
            expected=f"vectors [{num_items}, d] and present [{num_items}]",
            got=f"{list(values.shape)} and {list(mask.shape)}",
            remedy="pass one row per item",
        )
    with np.errstate(over="ignore"):
        halves = values.astype(np.float16)
    halves[~mask] = 0
    if not np.isfinite(halves).all():
        raise DataError(
            subject,
            expected="values finite in float16",
            got=f"{int((~np.isfinite(halves)).any(axis=1).sum())} rows that are not",
            remedy="scale the vectors",
        )
    return Modality(halves, mask)


def _save_modality(folder: Path, name: str, modality: Modality) -> None:
    np.save(folder / f"{name}.npy", modality.vectors)
    np.save(folder / f"{name}.present.npy", modality.present)


def _new_folder(folder: str | Path) -> Path:
    folder = Path(folder)
    if (folder / "keys.npy").exists():
        raise DataError(f"folder {folder}", expected="no item table yet", got="one", remedy="write to another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _map(folder: Path, name: str, dtype: type[_Scalar], ndim: int) -> npt.NDArray[_Scalar]:
    path = folder / f"{name}.npy"
    try:
        array: npt.NDArray[_Scalar] = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise MissingInputError(
            f"item table {folder}", expected=f"file {path.name}", got="none", remedy="run `urm encode` again"
        ) from None
    except (ValueError, OSError, EOFError) as error:
        raise _damaged(path, "a NumPy array", " ".join(str(error).split())) from None
    if array.dtype != dtype or array.ndim != ndim:
        raise _damaged(path, f"{np.dtype(dtype)} of {ndim} dimension(s)", f"{array.dtype} of {array.ndim}")
    return array


def _map_hashes(folder: Path, suffix: str) -> Mapping[str, Words]:
    found = sorted(path.name.removesuffix(suffix) for path in folder.glob(f"*{suffix}"))
    return MappingProxyType({name: _map(folder, (name + suffix).removesuffix(".npy"), np.uint64, 1) for name in found})


def _damaged(path: Path, expected: str, got: object) -> DataError:
    return DataError(f"item table file {path}", expected=expected, got=got, remedy="run `urm encode` again")
