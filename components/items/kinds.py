"""Kinds: to which of the catalogue's most frequent categories an item belongs, level by level, one column for each.

    vector of an item in `category_<n>`   1 in the column of its category at level n, else 0   [K_n]

Codes (codes.py) are narrower, but a sum of many of them is mostly noise. Columns can be summed over a history: how many
of its items are of each category is then exact, which tells what is new to a user and what he keeps buying.
A query that names a category names its column, too (docs/model.md).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from components.items.codes import Words, name_hashes

KINDS = ("category_0", "category_1", "category_2")  # names of the modalities, by level from the top
MAX_KINDS = 512  # columns of all levels together; the upper levels come first


def kind_vectors(
    paths: Sequence[Sequence[str] | None],
) -> dict[str, tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]]:
    """Vectors [n, K_n] by level, and whether each item has a column [n], for the category paths of n items."""
    found = {}
    for name, kinds in _choose_kinds(paths).items():
        places = {kind: place for place, kind in enumerate(kinds)}
        columns = np.array([places.get(tuple(path[: len(kinds[0])]), -1) if path else -1 for path in paths])
        present = columns >= 0
        vectors = np.zeros((len(paths), len(kinds)), dtype=np.float16)
        vectors[np.flatnonzero(present), columns[present]] = 1
        found[name] = (vectors, present)
    return found


def kind_names(paths: Sequence[Sequence[str] | None]) -> dict[str, Words]:
    """Hash of the name of each column [K_n] by level, for the same paths; two columns may have one name."""
    return {name: name_hashes([kind[-1] for kind in kinds]) for name, kinds in _choose_kinds(paths).items()}


def _choose_kinds(paths: Sequence[Sequence[str] | None]) -> dict[str, list[tuple[str, ...]]]:
    """Categories with a column, as paths from the top, by level.

    At each level those with the most items, as long as there are columns left. A level with less than two categories
    tells nothing and is left out.
    """
    found = {}
    left = MAX_KINDS
    for level, name in enumerate(KINDS):
        counts = Counter(tuple(path[: level + 1]) for path in paths if path and len(path) > level)
        ordered = sorted(counts, key=lambda value: (-counts[value], value))[:left]
        if len(ordered) >= 2:
            left -= len(ordered)
            found[name] = ordered
    return found
