"""Kinds: to which of the catalogue's most frequent categories an item belongs, level by level, one column for each.

    vector of an item in `category_<n>`   1 in the column of its category at level n, else 0   [K_n]

Codes (codes.py) are narrower, but a sum of many of them is mostly noise. Columns can be summed over a history: how many
of its items are of each category is then exact, which tells what is new to a user and what he keeps buying (ADR 33).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

KINDS = ("category_0", "category_1", "category_2")  # names of the modalities, by level from the top
MAX_KINDS = 512  # columns of all levels together; the upper levels come first


def kind_vectors(
    paths: Sequence[Sequence[str] | None],
) -> dict[str, tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]]:
    """Vectors [n, K_n] by level, and whether each item has a column [n], for the category paths of n items.

    At each level the categories with the most items have columns, as long as there are some left. A level with less
    than two categories tells nothing and is left out.
    """
    found = {}
    left = MAX_KINDS
    for level, name in enumerate(KINDS):
        values = [tuple(path[: level + 1]) if path and len(path) > level else None for path in paths]
        counts = Counter(value for value in values if value is not None)
        ordered = sorted(counts, key=lambda value: (-counts[value], value))[:left]
        if len(ordered) < 2:
            continue
        left -= len(ordered)
        places = {value: place for place, value in enumerate(ordered)}
        columns = np.array([-1 if value is None else places.get(value, -1) for value in values])
        present = columns >= 0
        vectors = np.zeros((len(paths), len(ordered)), dtype=np.float16)
        vectors[np.flatnonzero(present), columns[present]] = 1
        found[name] = (vectors, present)
    return found
