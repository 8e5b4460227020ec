"""The test examples, and how a model's lists do on them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from components.evaluation.metrics import Exposure, Floats, Ints, Mask, Ranked, expose, find_ranks, first, surprise
from components.exceptions import DataError
from components.schemas.examples import ragged

HEAD_QUANTILE = 0.8  # of training popularity: above it an item belongs to the head
EXAMPLES_PER_PART = 8192  # whose list entries are looked at a time


@dataclass(frozen=True)
class TestExamples:
    """Test examples, sorted by example_id, with what the metrics need. Items are given by catalogue index."""

    __test__ = False  # not a test class, whatever pytest thinks of the name

    ids: Ints  # example_id, ascending [E]
    users: npt.NDArray[Any]  # user of each [E]
    tasks: npt.NDArray[Any]  # task name of each [E]
    held_out_queries: npt.NDArray[Any]  # query of each example of a task with held-out queries, else None [E]
    cuts: pd.Series  # cut_ts of each [E]
    history_items: Ints  # distinct items each user had [E]
    targets: Ints  # target items, flat, with `target_offsets` [E + 1]
    target_offsets: Ints
    catalogue: Ints  # item_id, ascending [n]
    popularity: Floats  # popularity quantile of each catalogue item [n]
    train_events: Ints  # training events of each catalogue item [n]

    @classmethod
    def build(
        cls, examples: pa.Table, contexts: pa.Table, catalogue: pa.Table, held_out: Collection[str] = ()
    ) -> TestExamples:
        """Join examples with their users; contexts must hold every context_id.

        `held_out` names the tasks with held-out queries.
        """
        examples = examples.sort_by("example_id")
        rows = pc.index_in(examples.column("context_id"), value_set=contexts.column("context_id"))
        asked = contexts.select(["user_id", "num_items", "cut_ts"]).take(rows)
        targets, offsets = ragged(examples, "target_item_ids")
        tasks = np.array(examples.column("task").to_pylist(), dtype=object)
        queries = np.array(examples.column("query").to_pylist(), dtype=object)
        queries[~np.isin(tasks, list(held_out))] = None
        item_ids = catalogue.column("item_id").to_numpy()
        return cls(
            ids=examples.column("example_id").to_numpy(),
            users=np.array(asked.column("user_id").to_pylist(), dtype=object),
            tasks=tasks,
            held_out_queries=queries,
            cuts=asked.column("cut_ts").to_pandas(),
            history_items=asked.column("num_items").to_numpy(),
            targets=np.searchsorted(item_ids, targets.astype(np.int64)),
            target_offsets=offsets,
            catalogue=item_ids,
            popularity=catalogue.column("popularity_quantile").to_numpy().astype(np.float64),
            train_events=catalogue.column("train_events").to_numpy(),
        )

    def segments(self) -> dict[str, tuple[Mask, Mask]]:
        """Groups of users and of targets: name -> (examples in it [E], their targets in it, flat).

        Users are light up to the median number of distinct items in the test histories, and heavy above. A target is
        new without a training event; else it belongs to the head or the tail by its popularity.
        """
        every_example, every_target = np.ones(len(self.ids), dtype=bool), np.ones(len(self.targets), dtype=bool)
        light = self.history_items <= np.median(self.history_items)
        new = self.train_events[self.targets] == 0
        head = ~new & (self.popularity[self.targets] > HEAD_QUANTILE)
        return {
            "light users": (light, every_target),
            "heavy users": (~light, every_target),
            "head targets": (every_example, head),
            "tail targets": (every_example, ~new & ~head),
            "new targets": (every_example, new),
        }


@dataclass(frozen=True)
class Measured:
    """A model on the test examples."""

    ranked: Ranked  # ranks of the targets
    exposure: Exposure  # popularity of what the top k show
    coverage: dict[str, float]  # task -> share of the catalogue in at least one top k


def measure(examples: TestExamples, predictions: pa.Table, model: str, k: int) -> Measured:
    """Hold one model's lists against the targets, in parts, so that memory does not grow with the examples.

    `predictions` are the lists of this model alone, columns example_id and item_ids; k is the cut-off of exposure and
    coverage.

    Raises:
        DataError: The predictions do not cover exactly these examples.
    """
    ids = predictions.column("example_id").to_numpy()
    order = np.argsort(ids, kind="stable")
    if not np.array_equal(ids[order], examples.ids):
        raise DataError(
            f"predictions of {model}",
            expected=f"one list for each of {len(examples.ids)} test examples",
            got=f"{len(ids)} lists, or other examples",
            remedy="run the stages from `urm baseline` on again",
        )
    surprises, shown = surprise(examples.train_events), _Shown(examples)
    ranks: list[Ranked] = []
    exposures: list[Exposure] = []
    for start in range(0, len(order), EXAMPLES_PER_PART):
        rows = order[start : start + EXAMPLES_PER_PART]
        ids_in_lists, offsets = ragged(predictions.select(["item_ids"]).take(rows), "item_ids")
        items = np.searchsorted(examples.catalogue, ids_in_lists.astype(np.int64))
        bounds = examples.target_offsets[start : start + len(rows) + 1]
        ranks.append(find_ranks(items, offsets, examples.targets[bounds[0] : bounds[-1]], bounds - bounds[0]))
        exposures.append(expose(items, offsets, k, examples.popularity, surprises))
        shown.add(start, *first(items, offsets, k))
    ranked = Ranked(
        np.concatenate([part.ranks for part in ranks]),
        np.repeat(np.arange(len(order)), np.diff(examples.target_offsets)),
        len(order),
    )
    columns = (
        np.concatenate(parts) for parts in zip(*((e.shown, e.quantile, e.surprise) for e in exposures), strict=True)
    )
    return Measured(ranked, Exposure(*columns), shown.coverage())


class _Shown:
    """Which catalogue items each task has shown to anybody."""

    def __init__(self, examples: TestExamples) -> None:
        self.names, self.codes = np.unique(examples.tasks.astype(str), return_inverse=True)
        self.seen = np.zeros((len(self.names), len(examples.catalogue)), dtype=bool)

    def add(self, start: int, items: Ints, owners: Ints) -> None:
        """Note the items shown to examples, numbered from `start` on."""
        self.seen[self.codes[start + owners], items] = True

    def coverage(self) -> dict[str, float]:
        """Share of the catalogue that each task has shown."""
        return {str(name): float(share) for name, share in zip(self.names, self.seen.mean(axis=1), strict=True)}
