"""The files of the stage: test predictions, popularity, the trained models and their item vectors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file
from torch import nn

from components.baseline.data import Dataset
from components.baseline.network import TargetAttention
from components.baseline.ranking import Ranking, Scorer, chunk_by_context, rank
from components.baseline.rules import Popularity
from components.baseline.sasrec import SasRec
from components.config import BaselineConfig
from components.schemas.predictions import POPULARITY, PREDICTION_DEPTH, PREDICTIONS

POPULARITY_DEPTH = 1000  # items kept per task
CONTEXTS_PER_PART = 2048  # of which the ranked lists are held at a time


def write_predictions(path: Path, scorers: Mapping[str, Scorer], data: Dataset, k: int) -> None:
    """Rank the test examples by every model, max(k, PREDICTION_DEPTH) items each.

    One model follows another, its examples in ascending order of their contexts; written in parts, since the lists of
    all test examples may not fit into memory.
    """
    rows, depth = data.examples.rows("test"), max(k, PREDICTION_DEPTH)
    with pq.ParquetWriter(path, PREDICTIONS, compression="zstd") as writer:
        for name, scorer in scorers.items():
            for part in chunk_by_context(data, rows, CONTEXTS_PER_PART):
                writer.write_table(to_predictions(name, rank(scorer, data, part, depth), data))


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
    """Weights, sizes and vocabularies of a target-attention network."""
    description = {
        "shape": network.shape.model_dump(),
        "prompts": dict(zip((task.name for task in data.tasks), data.prompts.tolist(), strict=True)),
        "item_features": data.items.names,
        "words": data.examples.vocabulary,
    }
    _write_model(folder, network, description)


def write_sasrec(folder: Path, model: SasRec, config: BaselineConfig) -> None:
    """Weights and settings of a sequential model."""
    description = {"num_items": model.items.num_embeddings, "length": model.length} | config.sasrec.model_dump()
    _write_model(folder, model, description)


def _write_model(folder: Path, network: nn.Module, description: dict[str, Any]) -> None:
    folder.mkdir()
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, folder / "network.safetensors")
    (folder / "network.json").write_text(json.dumps(description, indent=2) + "\n")
