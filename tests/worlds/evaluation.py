"""A run directory up to `sft` on a tiny world: 60 items, 16 users, an untrained URM, baselines by a fixed rule."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.addresses import write_json
from components.config import RunConfig, load_config
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.examples import CATALOGUE, CONTEXTS, EXAMPLES
from components.schemas.predictions import PREDICTIONS
from components.storage import StageResult
from components.urm.inference import UrmRecaller
from components.urm.network.build import build_model
from components.urm.network.files import save_model
from tests.worlds import CONFIGS
from tests.worlds.backbone import write_backbone

__all__ = ["config", "inputs", "run_dir"]  # fixtures

IDS = np.arange(1000, 1060)
BASELINES = ("popularity", "own_history", "sasrec", "target_attention", "some_other")  # any the stage may write
TASKS = [
    {"name": "next_purchase", "description": "Next.", "prompt": "Task: what comes next."},
    {"name": "new_item", "description": "New.", "prompt": "Task: new items.",
     "target": {"history": "not_bought"}, "exclude_bought": True},
    {"name": "text_query", "description": "Query.", "prompt": "Task: search for {{ query }}.",
     "target": {"query_category_level": 0}},
    {"name": "long_tail", "description": "Rare; nobody in this world buys so.", "prompt": "Task: rare items."},
]  # fmt: skip


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    backbone = write_backbone(tmp_path_factory.mktemp("backbone"), num_layers=1)
    urm = {
        "backbone": str(backbone), "num_layers": 1, "num_user_vectors": 2, "fusion_dimension": 16,
        "history_length": 6, "copy_length": 8,
    }  # fmt: skip
    overrides = {"tasks": TASKS, "urm": urm, "evaluation": {"k": 10, "bootstrap_samples": 200}}
    return load_config(CONFIGS / "complete_journey.yaml", overrides)


@pytest.fixture(scope="session")
def inputs(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the files of features, baseline and sft."""
    folder, random = tmp_path_factory.mktemp("inputs"), np.random.default_rng(0)
    contexts, examples = _ask(random)
    catalogue = pa.table(
        {
            "item_id": IDS,
            "train_events": np.maximum(0, np.arange(57, -3, -1)),  # the last ones are new
            "popularity_quantile": np.linspace(1, 0, 60, dtype=np.float32),
        },
        schema=CATALOGUE,
    )
    pq.write_table(catalogue, folder / "catalogue.parquet")
    pq.write_table(pa.Table.from_pylist(contexts, schema=CONTEXTS), folder / "contexts.parquet")
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES), folder / "examples.parquet")
    test = [row for row in examples if row["split"] == "test"]
    lists = [
        {"example_id": row["example_id"], "model": model, "item_ids": items.tolist(), "scores": np.arange(30, 0, -1.0)}
        for model in BASELINES
        for row in test
        for items in [random.permutation(IDS)[:30]]
    ]
    pq.write_table(pa.Table.from_pylist(lists, schema=PREDICTIONS), folder / "predictions.parquet")

    vectors, present = random.normal(size=(60, 8)), np.ones(60, dtype=bool)
    modalities = {"id": (vectors, present), "text": (vectors[:, :6], present), POPULARITY: (vectors[:, :1], present)}
    write_item_table(folder / "item_table", IDS, modalities)
    torch.manual_seed(1)
    new = build_model(config.urm, ItemTable.open(folder / "item_table"), ["purchase"], folder)
    save_model(folder / "model", new.model.eval(), new.builder.writer, new.description)
    (folder / "candidates").mkdir()
    np.save(folder / "candidates" / "keys.npy", IDS)
    recaller = UrmRecaller(new.model, new.builder, new.description.config.combine)
    np.save(folder / "candidates" / "vectors.npy", recaller.encode_items(IDS))
    return folder


@pytest.fixture(scope="session")
def run_dir(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the earlier stages; stages of this package may be run in it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    put(folder, "features", {name: inputs / f"{name}.parquet" for name in ("catalogue", "contexts", "examples")})
    put(folder, "baseline", {"predictions": inputs / "predictions.parquet"})
    put(folder, "sft", {name: inputs / name for name in ("model", "item_table", "candidates")})
    return folder


def put(run_dir: Path, stage: str, outputs: dict[str, Path]) -> None:
    result = StageResult(
        stage=stage, config="complete_journey", fingerprint=stage, seconds=1,
        outputs={name: str(path) for name, path in outputs.items()},
        started_at=datetime.now(UTC), finished_at=datetime.now(UTC),
    )  # fmt: skip
    write_json(str(run_dir / stage / "result.json"), result.model_dump(mode="json"))


def _ask(random: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    contexts: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for number in range(36):
        split = "test" if number < 32 else "validation"
        history = random.choice(IDS, size=int(random.integers(1, 12)), replace=False)
        contexts.append(
            {
                "context_id": number, "user_id": f"u{number % 16}", "cut_ts": datetime(2017, 9, 4, 5, tzinfo=UTC),
                "split": split, "history_item_ids": history.tolist(), "history_counts": [1] * len(history),
                "history_days_since": np.arange(len(history), dtype=float).tolist(),
                "history_behaviors": ["purchase"] * len(history), "num_events": len(history),
                "num_items": len(history), "num_active_days": 1, "days_since_last": 1.0, "top_categories": ["milk"],
            }
        )  # fmt: skip
        fresh = random.choice(np.setdiff1d(IDS, history), size=3, replace=False).tolist()
        answers = {"next_purchase": fresh[:2] + history[:2].tolist(), "new_item": fresh, "text_query": fresh[:1]}
        for task, targets in answers.items():
            examples.append(
                {
                    "example_id": len(examples), "context_id": number, "split": split, "task": task,
                    "query": "milk" if task == "text_query" else None, "target_item_ids": targets,
                    "target_categories": [],
                }
            )  # fmt: skip
    return contexts, examples
