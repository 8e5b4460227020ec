"""What all models share: scoring examples over the full catalogue, filtering, top-k, recall."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from components.baseline.data import Dataset, Floats, Ints, gather

CONTEXTS_PER_CHUNK = 32  # bounds memory: a chunk's scores are [examples, catalogue]


class Scorer(Protocol):
    """A model that scores every catalogue item."""

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores [len(rows), catalogue] of example rows, those of one context side by side; -inf: nothing to say."""
        ...


Chosen = TypeVar("Chosen", bound=Scorer)


@dataclass(frozen=True)
class Ranking:
    """The best items of each example."""

    rows: Ints  # example rows, shape [E]
    items: Ints  # catalogue indices, best first, shape [E, depth]; -1 after the last one
    scores: Floats


def rank(scorer: Scorer, data: Dataset, rows: Ints, depth: int) -> Ranking:
    """Rank the catalogue for each example; ties come in no particular order.

    Items the user already had are no candidates of a task with `exclude_bought`, whatever the model.
    """
    depth = min(depth, len(data.items))
    parts = [_rank_chunk(scorer, data, chunk, depth) for chunk in chunk_by_context(data, rows, CONTEXTS_PER_CHUNK)]
    return Ranking(
        rows=np.concatenate([part.rows for part in parts]),
        items=np.concatenate([part.items for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
    )


def chunk_by_context(data: Dataset, rows: Ints, num_contexts: int) -> Iterator[Ints]:
    """Cut example rows, sorted by context, into chunks of whole contexts."""
    _, ordinal = np.unique(data.examples.contexts[rows], return_inverse=True)
    bounds = np.searchsorted(ordinal, np.arange(0, ordinal[-1] + 1 + num_contexts, num_contexts))
    for start, end in itertools.pairwise(bounds):
        if start < end:
            yield rows[start:end]


class ByQuery:
    """One scorer for the examples that have a query, another for those that have none."""

    def __init__(self, data: Dataset, with_query: Scorer, without: Scorer) -> None:
        self.data = data
        self.scorers = (without, with_query)

    def score(self, rows: Ints) -> torch.Tensor:
        """Scores of shape [len(rows), catalogue]."""
        asked = self.data.examples.query[rows] >= 0
        scores = torch.empty(len(rows), len(self.data.items))
        for scorer, mine in zip(self.scorers, (~asked, asked), strict=True):
            if mine.any():
                scores[torch.from_numpy(mine)] = scorer.score(rows[mine])
        return scores


def find_recall(ranking: Ranking, data: Dataset, k: int) -> npt.NDArray[np.float64]:
    """Recall@k of each example of a ranking, |top-k ∩ targets| / min(|targets|, k), shape [E]."""
    targets, owner = gather(data.examples.targets, data.examples.target_offsets, ranking.rows)
    num_items = len(data.items)
    top = ranking.items[:, :k]
    recommended = (np.arange(len(top))[:, None] * num_items + top)[top >= 0]
    hits = np.bincount(owner[np.isin(owner * num_items + targets, recommended)], minlength=len(top))
    recall: npt.NDArray[np.float64] = hits / np.minimum(np.bincount(owner, minlength=len(top)), k)
    return recall


def mean_recall(ranking: Ranking, data: Dataset, k: int) -> dict[str, float]:
    """Recall@k per task, averaged over its examples, and under the key "mean" its mean over tasks."""
    recall = find_recall(ranking, data, k)
    tasks = data.examples.tasks[ranking.rows]
    by_task = {data.tasks[task].name: float(recall[tasks == task].mean()) for task in np.unique(tasks)}
    return by_task | {"mean": float(np.mean(list(by_task.values())))}


def choose(
    make: Callable[..., Chosen], grid: Sequence[dict[str, float]], data: Dataset, k: int, *, rows: Ints | None = None
) -> tuple[Chosen, list[dict[str, float]]]:
    """The setting of a model with the best mean recall@k on validation examples, by default all.

    Returns:
        The model, and the trials: each setting with its `validation_recall`, best first; none where there are no rows,
        which leaves the first setting.
    """
    rows = data.examples.rows("validation") if rows is None else rows
    if not len(rows):
        return make(**grid[0]), []
    trials = [
        setting | {"validation_recall": mean_recall(rank(make(**setting), data, rows, k), data, k)["mean"]}
        for setting in grid
    ]
    trials.sort(key=lambda trial: -trial["validation_recall"])
    best = {name: value for name, value in trials[0].items() if name != "validation_recall"}
    return make(**best), trials


def _rank_chunk(scorer: Scorer, data: Dataset, rows: Ints, depth: int) -> Ranking:
    scores = scorer.score(rows)
    exclude = data.exclude_bought[data.examples.tasks[rows]]
    bought, owner = gather(data.contexts.items, data.contexts.offsets, data.examples.contexts[rows[exclude]])
    scores[torch.from_numpy(np.flatnonzero(exclude)[owner]), torch.from_numpy(bought)] = -torch.inf
    best, items = torch.topk(scores, depth, dim=1)
    items[best == -torch.inf] = -1
    return Ranking(rows=rows, items=items.numpy(), scores=best.numpy())
