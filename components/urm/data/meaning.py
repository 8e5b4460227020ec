"""What a query or a guidance means: its text vector, and the categories of the items with the nearest texts.

The encoder is the one that encoded the texts of the items. "Something to wash my hair" is near shampoos, though it has
no word of their name. Names of categories are too short to be compared with: of 110 such phrases the nearest name is
right for 11 %, and most of the nearest items are of the right category for more than 40 % (docs/model.md).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from components.exceptions import DataError
from components.items.table import ItemTable
from components.items.text import TextEncoder
from components.urm.data.batch import MEANING
from components.urm.data.request import Floats

NEAREST_ITEMS = 20
MAX_ITEMS = 2**15  # of the table, evenly spread: categories need no more, and a query stays within milliseconds
MAX_CACHED = 4096  # queries
_BATCH_SIZE = 32


class QueryMeaning:
    """Vectors of queries in the parts of item space that have a meaning.

    Raises:
        ConfigError: The encoder is no sentence encoder.
        DataError: The item table's texts are of another encoder.
    """

    def __init__(self, encoder: str | Path, table: ItemTable, parts: Sequence[str]) -> None:
        """Take a packaged encoder by name or a folder, and which parts the model has."""
        self.parts = [name for name in MEANING if name in parts]
        self.widths = [int(table.modalities[name].vectors.shape[1]) for name in self.parts]
        self._encoder = TextEncoder(str(encoder), torch.device("cpu"), _BATCH_SIZE)
        text = table.modalities["text"]
        if text.vectors.shape[1] != self._encoder.dimension:
            raise DataError(
                "item table",
                expected=f"text vectors of {self._encoder.dimension} numbers, as {encoder} gives them",
                got=text.vectors.shape[1],
                remedy="run `urm encode` again with this encoder",
            )
        rows = np.flatnonzero(text.present)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_ITEMS)).astype(np.int64)] if len(rows) else rows
        self._texts = torch.from_numpy(text.vectors[rows].astype(np.float32))
        self._items = [table.modalities[name].vectors[rows] for name in self.parts]
        self._max_cached = MAX_CACHED
        self._cache: dict[str, Floats] = {}

    @property
    def folder(self) -> Path:
        """Folder of the encoder."""
        return self._encoder.folder

    def without_cache(self) -> QueryMeaning:
        """The same, whose vectors depend on nothing but the queries of a call, to the last bit."""
        other = copy.copy(self)
        other._max_cached = 0
        return other

    def read(self, queries: Sequence[str]) -> Floats:
        """One row per query [E, sum of the widths]; zero for an empty one."""
        known = self._cache if self._max_cached else {}
        if missing := sorted({query for query in queries if query and query not in known}):
            known = {**known, **dict(zip(missing, self._compute(missing), strict=True))}
            # The oldest go first; of one call all stay, however many.
            self._cache = dict(list(known.items())[-self._max_cached :]) if self._max_cached else {}
        nothing = np.zeros(sum(self.widths), dtype=np.float32)
        return np.stack([known[query] if query else nothing for query in queries])

    def _compute(self, queries: Sequence[str]) -> Floats:
        vectors = self._encoder.encode(queries).astype(np.float32)
        count = min(NEAREST_ITEMS, len(self._texts))
        nearest = (torch.from_numpy(vectors) @ self._texts.T).topk(count, dim=-1).indices.numpy()
        columns = [
            vectors if name == "text" else items[nearest].astype(np.float32).sum(axis=1) / max(count, 1)
            for name, items in zip(self.parts, self._items, strict=True)
        ]
        return np.concatenate(columns, axis=1)
