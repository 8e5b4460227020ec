"""From ranked lists to the per-example record and the tables of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from components.config import RunConfig
from components.evaluation.bootstrap import Comparison
from components.evaluation.metrics import (
    Floats,
    Ints,
    Ranked,
    count_hits,
    coverage,
    match_targets,
    ndcg,
    popularity_bias,
    recall,
)
from components.exceptions import DataError
from components.features.schema import ragged

MODELS = ("popularity", "own_history", "item_knn", "target_attention", "urm")
BASELINE, CANDIDATE = "target_attention", "urm"


def cutoffs(k: int, depth: int) -> tuple[int, ...]:
    """Cut-offs reported beside the headline k: 20 and 500 where the lists are that long."""
    return tuple(sorted({k, *(other for other in (20, 500) if other <= depth)}))


@dataclass(frozen=True)
class TestExamples:
    """Test examples, sorted by example_id, with what the metrics need.

    Attributes:
        ids: example_id, ascending [E].
        users: User of each [E].
        tasks: Task name of each [E].
        targets: Target items, flat, with `target_offsets` [E + 1].
        catalogue: item_id, ascending [n].
        popularity: Popularity quantile of each catalogue item [n].
    """

    __test__ = False  # not a test class, whatever pytest thinks of the name

    ids: Ints
    users: npt.NDArray[Any]
    tasks: npt.NDArray[Any]
    targets: Ints
    target_offsets: Ints
    catalogue: Ints
    popularity: Floats

    @classmethod
    def build(cls, examples: pa.Table, contexts: pa.Table, catalogue: pa.Table) -> TestExamples:
        """Join examples with their users; contexts must hold every context_id."""
        examples = examples.sort_by("example_id")
        users = dict(zip(*(contexts.column(name).to_pylist() for name in ("context_id", "user_id")), strict=True))
        targets, offsets = ragged(examples, "target_item_ids")
        return cls(
            ids=examples.column("example_id").to_numpy(),
            users=np.array([users[context] for context in examples.column("context_id").to_pylist()], dtype=object),
            tasks=np.array(examples.column("task").to_pylist(), dtype=object),
            targets=targets.astype(np.int64),
            target_offsets=offsets,
            catalogue=catalogue.column("item_id").to_numpy(),
            popularity=catalogue.column("popularity_quantile").to_numpy().astype(np.float64),
        )

    def rank(self, predictions: pa.Table, model: str) -> Ranked:
        """One model's lists against the targets.

        Raises:
            DataError: The predictions do not cover exactly these examples.
        """
        mine = predictions.filter(pa.compute.equal(predictions.column("model"), model)).sort_by("example_id")
        if not np.array_equal(mine.column("example_id").to_numpy(), self.ids):
            raise DataError(
                f"predictions of {model}",
                expected=f"one list for each of {len(self.ids)} test examples",
                got=f"{mine.num_rows} lists, or other examples",
                remedy="run the stages from `urm baseline` on again",
            )
        items, offsets = ragged(mine, "item_ids")
        return match_targets(items.astype(np.int64), offsets, self.targets, self.target_offsets)

    def quantiles(self, items: Ints) -> Floats:
        """Popularity quantile of catalogue items."""
        return self.popularity[np.searchsorted(self.catalogue, items)]


def record_hits(examples: TestExamples, ranked: dict[str, Ranked], ks: Iterable[int]) -> pd.DataFrame:
    """The per-example record, in the schema HITS."""
    return pd.concat(
        [
            pd.DataFrame(
                {
                    "example_id": examples.ids,
                    "user_id": examples.users,
                    "task": examples.tasks,
                    "model": model,
                    "k": np.int32(k),
                    "hits": count_hits(lists, k).astype(np.int32),
                    "targets": lists.num_targets.astype(np.int32),
                }
            )
            for model, lists in ranked.items()
            for k in ks
        ],
        ignore_index=True,
    )


def tabulate(examples: TestExamples, ranked: dict[str, Ranked], k: int, ks: Iterable[int]) -> pd.DataFrame:
    """One row a task and model: recall at every cut-off, NDCG@k, coverage@k, popularity bias@k."""
    rows: list[dict[str, Any]] = []
    for task in dict.fromkeys(examples.tasks):
        mask = examples.tasks == task
        target_quantiles = examples.quantiles(examples.targets[np.repeat(mask, np.diff(examples.target_offsets))])
        for model, lists in ranked.items():
            part = lists.select(mask)
            row: dict[str, Any] = {"task": task, "model": model, "examples": int(mask.sum())}
            for cutoff in ks:
                row[f"recall@{cutoff}"] = float(recall(count_hits(part, cutoff), part.num_targets, cutoff).mean())
            row[f"ndcg@{k}"] = float(ndcg(part, k).mean())
            row[f"coverage@{k}"] = coverage(part, k, len(examples.catalogue))
            row[f"popularity_bias@{k}"] = popularity_bias(examples.quantiles(part.items), target_quantiles, part, k)
            rows.append(row)
    return pd.DataFrame(rows)


def summarise(table: pd.DataFrame, comparison: Comparison, config: RunConfig) -> dict[str, Any]:
    """The stage's metrics, as docs/architecture.md states them, tasks in the run's order; what is undefined is null."""
    confidence = config.evaluation.gate.confidence
    order = {task.name: place for place, task in enumerate(config.tasks)}
    recalls: dict[str, dict[str, float]] = {task: {} for task in comparison.tasks}
    for row in table.to_dict("records"):
        recalls[row["task"]][row["model"]] = float(row[f"recall@{config.evaluation.k}"])
    low, high = comparison.interval(confidence)
    mean_low, mean_high = comparison.mean_interval(confidence)
    p_values = comparison.p_different()
    tasks = {
        task: {
            "baseline": float(comparison.baseline[index]),
            "urm": float(comparison.model[index]),
            "lift": _number(comparison.lift[index]),
            "low": _number(low[index]),
            "high": _number(high[index]),
            "p_value": float(p_values[index]),
            "examples": int(comparison.examples[index]),
            "recall": recalls[task],
        }
        for index, task in sorted(enumerate(comparison.tasks), key=lambda entry: order[entry[1]])
    }
    return {
        "mean_recall": {model: float(np.mean([recall[model] for recall in recalls.values()])) for model in MODELS},
        "mean_lift": _number(comparison.mean_lift),
        "mean_lift_low": _number(mean_low),
        "mean_lift_high": _number(mean_high),
        "tasks_won": int((comparison.model > comparison.baseline).sum()),
        "tasks": tasks,
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
