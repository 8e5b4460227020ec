"""Two rules without training: what is popular in a task, and what the user had before."""

import numpy as np
import torch

from components.baseline.data import Dataset, Floats, Ints, gather, places


class Popularity:
    """Frequency of an item among the training targets of the task; all training events break ties."""

    def __init__(self, data: Dataset) -> None:
        examples = data.examples
        targets, owner = gather(examples.targets, examples.target_offsets, examples.rows("train"))
        tasks = examples.tasks[examples.rows("train")][owner]
        counts = np.zeros((len(data.tasks), len(data.items)), dtype=np.float32)
        np.add.at(counts, (tasks, targets), 1)
        self.data = data
        self.counts: Floats = counts
        self.scores: Floats = counts + data.items.popularity * np.float32(0.5)  # a half never outweighs one target

    def score(self, rows: Ints) -> torch.Tensor:
        """The same scores for every example of a task, shape [len(rows), catalogue]."""
        return torch.from_numpy(self.scores[self.data.examples.tasks[rows]])

    def top(self, num_items: int) -> list[tuple[Ints, Floats]]:
        """Best items of each task, as (catalogue indices, scores), best first."""
        order = np.argsort(-self.scores, axis=1, kind="stable")[:, :num_items]
        return [(best, scores[best]) for best, scores in zip(order, self.scores, strict=True)]


class OwnHistory:
    """Items of the user's own history alone, by how often and how recently: log(1 + count) · 2^(-days / half-life)."""

    def __init__(self, data: Dataset, half_life_days: float) -> None:
        self.data = data
        self.half_life_days = half_life_days

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]; -inf outside the history."""
        contexts = self.data.contexts
        flat, owner = places(contexts.offsets, self.data.examples.contexts[rows])
        scores = torch.full((len(rows), len(self.data.items)), -torch.inf)
        weights = history_weights(contexts.counts[flat], contexts.days[flat], self.half_life_days)
        scores[torch.from_numpy(owner), torch.from_numpy(contexts.items[flat])] = torch.from_numpy(weights)
        return scores


def history_weights(counts: Floats, days: Floats, half_life_days: float) -> Floats:
    """Weight of a history item: log(1 + count) · 2^(-days / half-life)."""
    weights: Floats = (np.log1p(counts) * np.exp2(-days / half_life_days)).astype(np.float32)
    return weights
