"""How far a task can be driven with what there is: the best of all models on it, and of two of them together.

The ensemble joins the lists of URM and target attention by reciprocal rank fusion (Cormack, Clarke and Büttcher 2009):
an item scores Σ 1 / (RANK_OFFSET + rank) over the lists that hold it. It is no candidate of the gate, since serving it
would mean to run both models; where it is far ahead of either, each knows what the other does not.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from components.evaluation.examples import EXAMPLES_PER_PART, TestExamples
from components.evaluation.metrics import Ints, count_hits, find_ranks, recall
from components.evaluation.summary import CANDIDATE
from components.schemas.examples import ragged

ENSEMBLE = "ensemble"
RANK_OFFSET = 60  # of the paper; ranks count from one


def fuse(lists: list[tuple[Ints, Ints]], k: int) -> tuple[Ints, Ints]:
    """Join several lists of each example by reciprocal ranks.

    Args:
        lists: Of each model the items, flat, best first, and where each example's list starts, and the end [E + 1].
        k: Items wanted per example.

    Returns:
        Items and offsets in the same form; of equal scores the lower item comes first.
    """
    num_examples = len(lists[0][1]) - 1
    span = 1 + max(items.max(initial=0) for items, _ in lists)
    owners = [np.repeat(np.arange(num_examples), np.diff(offsets)) for _, offsets in lists]
    scores = [
        1.0 / (RANK_OFFSET + 1 + np.arange(len(items)) - offsets[owner])
        for (items, offsets), owner in zip(lists, owners, strict=True)
    ]
    keys = np.concatenate([owner * span + items for (items, _), owner in zip(lists, owners, strict=True)])
    distinct, places = np.unique(keys, return_inverse=True)
    totals = np.bincount(places, np.concatenate(scores))
    owner = distinct // span
    order = np.lexsort((-totals, owner))  # stable: ascending items among equals
    starts = np.searchsorted(owner, np.arange(num_examples + 1))
    kept = np.arange(len(order)) - starts[owner] < k  # sorted by example, so places of `owner` and `order` agree
    lengths = np.minimum(np.diff(starts), k)
    return distinct[order][kept] % span, np.concatenate([[0], np.cumsum(lengths)])


def read_lists(predictions: ds.Dataset, model: str, depth: int) -> pa.Table:
    """The first `depth` items of a model's lists, sorted by example_id; the whole lists are never in memory."""
    columns = {"example_id": ds.field("example_id"), "item_ids": pc.list_slice(ds.field("item_ids"), 0, depth)}
    return predictions.to_table(columns=columns, filter=pc.field("model") == model).sort_by("example_id")


def ensemble_recall(examples: TestExamples, lists: list[pa.Table], k: int) -> dict[str, float]:
    """Recall@k of the fused lists by task; the lists, from `read_lists`, cover these examples."""
    found = []
    for start in range(0, len(examples.ids), EXAMPLES_PER_PART):
        parts = [ragged(table.slice(start, EXAMPLES_PER_PART).select(["item_ids"]), "item_ids") for table in lists]
        indexed = [(np.searchsorted(examples.catalogue, items.astype(np.int64)), offsets) for items, offsets in parts]
        bounds = examples.target_offsets[start : start + len(indexed[0][1])]
        targets = examples.targets[bounds[0] : bounds[-1]]
        ranked = find_ranks(*fuse(indexed, k), targets, bounds - bounds[0])
        found.append(recall(count_hits(ranked, k), ranked.num_targets, k))
    recalls = np.concatenate(found)
    return {str(task): float(recalls[examples.tasks == task].mean()) for task in dict.fromkeys(examples.tasks)}


def find_ceiling(table: pd.DataFrame, ensemble: Mapping[str, float], k: int) -> dict[str, Any]:
    """The best known recall@k of each task, whose it is, and the share of it that URM reaches.

    `table` is that of `summary.tabulate`; `ensemble` is the recall of the ensemble by task.
    """
    tasks: dict[str, dict[str, Any]] = {}
    for task, rows in table.groupby("task", sort=False):
        recalls = dict(zip(rows["model"], rows[f"recall@{k}"].astype(float), strict=True))
        recalls[ENSEMBLE] = ensemble[str(task)]
        by = max(recalls, key=lambda model: recalls[model])
        tasks[str(task)] = {"recall": recalls[by], "by": by, "ensemble": ensemble[str(task)], "urm": recalls[CANDIDATE]}
    mean = float(np.mean([entry["recall"] for entry in tasks.values()]))
    reached = float(np.mean([entry["urm"] for entry in tasks.values()]))
    share = reached / mean if mean > 0 else None
    return {"mean": mean, "share": share, "ensemble": float(np.mean(list(ensemble.values()))), "tasks": tasks}
