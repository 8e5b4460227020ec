"""The files of the stage: test predictions, popularity, the network and its item vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from components.baseline.data import Dataset
from components.baseline.network import TargetAttention
from components.baseline.ranking import Ranking, Scorer, rank
from components.baseline.rules import Popularity
from components.baseline.schema import POPULARITY, PREDICTION_DEPTH, PREDICTIONS

POPULARITY_DEPTH = 1000  # items kept a task


def write_predictions(path: Path, scorers: Mapping[str, Scorer], data: Dataset, k: int) -> None:
    """Rank the test examples by every model, max(k, PREDICTION_DEPTH) items each; rows are sorted within a model."""
    rows = data.examples.rows("test")
    with pq.ParquetWriter(path, PREDICTIONS, compression="zstd") as writer:
        for name, scorer in scorers.items():
            ranking = rank(scorer, data, rows, max(k, PREDICTION_DEPTH))
            writer.write_table(to_predictions(name, ranking, data))


def to_predictions(model: str, ranking: Ranking, data: Dataset) -> pa.Table:
    """A ranking in the schema PREDICTIONS, sorted by example_id."""
    order = np.argsort(data.examples.ids[ranking.rows])
    items, scores = ranking.items[order], ranking.scores[order]
    present = items >= 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(present.sum(axis=1))]).astype(np.int32))
    return pa.table(
        {
            "example_id": data.examples.ids[ranking.rows][order],
            "model": pa.repeat(model, len(order)),
            "item_ids": pa.ListArray.from_arrays(offsets, pa.array(data.items.ids[items[present]])),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[present].astype(np.float32))),
        },
        schema=PREDICTIONS,
    )


def write_popularity(path: Path, popularity: Popularity, data: Dataset) -> None:
    """The most popular items of every task, the fallback of the recall API."""
    tables = [
        pa.table(
            {"task": pa.repeat(task.name, len(items)), "item_id": data.items.ids[items], "score": scores},
            schema=POPULARITY,
        )
        for task, (items, scores) in zip(data.tasks, popularity.top(POPULARITY_DEPTH), strict=True)
    ]
    pq.write_table(pa.concat_tables(tables), path)


def write_network(folder: Path, network: TargetAttention, data: Dataset) -> None:
    """The folders `model` (weights, sizes and vocabularies) and `id_vectors` (item vectors in catalogue order)."""
    (folder / "model").mkdir()
    save_file(
        {name: value.contiguous() for name, value in network.state_dict().items()},
        folder / "model" / "network.safetensors",
    )
    description = {
        "shape": network.shape.model_dump(),
        "tasks": [task.name for task in data.tasks],
        "item_features": data.items.names,
        "words": data.examples.vocabulary,
    }
    (folder / "model" / "network.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "id_vectors").mkdir()
    np.save(folder / "id_vectors" / "keys.npy", data.items.ids)
    with torch.no_grad():
        np.save(folder / "id_vectors" / "vectors.npy", network.item_vectors().numpy())
