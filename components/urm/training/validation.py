"""Recall of a model in training, on validation examples and the full catalogue."""

from collections.abc import Callable, Sequence

import numpy as np

from components.config import UrmConfig
from components.urm.data.batches import BatchBuilder
from components.urm.data.examples import Example
from components.urm.data.request import Floats, Ids
from components.urm.inference import UrmRecaller
from components.urm.network.model import Urm
from components.urm.retrieval.exact import ExactIndex

REQUESTS_PER_PASS = 2048  # their user vectors are in memory at once


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

    def recall(self, model: Urm, k: int, report: Callable[[int], None] | None = None) -> tuple[list[Ids], list[Floats]]:
        """The k best items of each example and their scores, best first; the model stays in its mode.

        `report` is told how many examples are done.
        """
        training = model.training
        model.eval()
        recaller = UrmRecaller(model, self.builder, self.combine)
        recaller.index = ExactIndex(self.item_ids, recaller.encode_items(self.item_ids))
        requests = [example.request for example in self.examples]
        items: list[Ids] = []
        scores: list[Floats] = []
        for start in range(0, len(requests), REQUESTS_PER_PASS):
            found, of_found = recaller.recall(requests[start : start + REQUESTS_PER_PASS], k)
            items += found
            scores += of_found
            if report:
                report(len(items))
        model.train(training)
        return items, scores
