"""Recall of a model in training, on validation examples and the full catalogue."""

from collections.abc import Sequence

import numpy as np

from components.config import UrmConfig
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example
from components.urm.data.request import Floats, Ids
from components.urm.inference import UrmRecaller
from components.urm.network.model import Urm
from components.urm.retrieval.exact import ExactIndex


class Validation:
    """Measures Recall@k, hits / min(targets, k): the share of an example's targets among the k best of all items."""

    def __init__(
        self, examples: Sequence[Example], item_ids: Ids, builder: BatchBuilder, config: UrmConfig, k: int
    ) -> None:
        """Take validation examples and the catalogue's item ids."""
        self.examples = examples
        self.item_ids = item_ids
        self.builder = builder
        self.combine = config.combine
        self.k = k

    def measure(self, model: Urm) -> dict[str, float]:
        """Mean recall by task, and under "mean" the mean over tasks."""
        found, _ = self.recall(model, self.k)
        shares: dict[str, list[float]] = {}
        for example, items in zip(self.examples, found, strict=True):
            hits, most = np.isin(example.targets, items).sum(), min(len(example.targets), self.k)
            shares.setdefault(example.request.task.name, []).append(float(hits / most))
        recall = {task: float(np.mean(values)) for task, values in shares.items()}
        return recall | {"mean": float(np.mean(list(recall.values())))}

    def recall(self, model: Urm, k: int) -> tuple[list[Ids], list[Floats]]:
        """The k best items of each example and their scores, best first; the model stays in its mode."""
        training = model.training
        model.eval()
        recaller = UrmRecaller(model, self.builder, self.combine)
        recaller.index = ExactIndex(self.item_ids, recaller.encode_items(self.item_ids))
        found = recaller.recall([example.request for example in self.examples], k)
        model.train(training)
        return found
