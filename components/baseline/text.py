"""A retriever that knows texts alone: the nearest sentence vectors.

It answers the query of a task that has one; else it looks for what reads like the user's history. The text of an item
is its title and its category path (components/items/text.py): all that a query may ask for. Brands are not in it, and
no task asks for one by name.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from components.baseline.data import Dataset, Floats, Ints, places
from components.baseline.rules import history_weights
from components.caches import CachePlace
from components.config import ItemsConfig
from components.items.table import ItemTable
from components.items.text import Progress, TextEncoder, encode_texts


@dataclass(frozen=True)
class TextFeatures:
    """Frozen text vectors, L2-normalised, zero where absent."""

    items: Floats  # of the catalogue, [n, t]
    present: npt.NDArray[np.bool_]  # whether an item has one, bool [n]
    queries: Floats  # of the distinct queries, [Q, t]


def read_text_features(
    data: Dataset, item_table: Path, config: ItemsConfig, cached: CachePlace, progress: Progress | None = None
) -> TextFeatures:
    """Item vectors of the encode stage, and query vectors by the same encoder, cached between runs in `cached`.

    `progress` is called with (queries done, queries in all) now and then.
    """
    items, present = ItemTable.open(item_table).gather("text", data.items.ids)
    if not data.examples.queries:
        return TextFeatures(items, present, np.zeros((0, items.shape[1]), dtype=np.float32))
    encoder = TextEncoder(config.text_encoder, torch.device("cpu"), config.batch_size)
    vectors = encode_texts(data.examples.queries, encoder, cached, progress).vectors
    return TextFeatures(items, present, vectors.astype(np.float32))


class TextRetriever:
    """Cosine of an item's text to the query, or, without one, to the weighted mean of the history's texts."""

    def __init__(self, data: Dataset, text: TextFeatures, half_life_days: float) -> None:
        self.data = data
        self.text = text
        self.half_life_days = half_life_days

    def score(self, rows: Ints) -> Tensor:
        """Scores of shape [len(rows), catalogue]; -inf for items without text, and where nothing is known to ask."""
        contexts, query = self.data.contexts, self.data.examples.query[rows]
        flat, owner = places(contexts.offsets, self.data.examples.contexts[rows])
        weights = history_weights(contexts.counts[flat], contexts.days[flat], self.half_life_days)
        wanted = np.zeros((len(rows), self.text.items.shape[1]), dtype=np.float32)
        np.add.at(wanted, owner, weights[:, None] * self.text.items[contexts.items[flat]])
        wanted[query >= 0] = self.text.queries[query[query >= 0]]
        lengths = np.linalg.norm(wanted, axis=1, keepdims=True)
        scores = (wanted / np.maximum(lengths, np.float32(1e-12))) @ self.text.items.T
        scores[:, ~self.text.present] = -np.inf
        scores[lengths[:, 0] == 0] = -np.inf
        return torch.from_numpy(scores)
