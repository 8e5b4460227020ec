"""A run directory up to `sft` on a tiny world: 40 items of four categories, 12 users, an untrained URM."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from components.addresses import write_json
from components.config import RunConfig, load_config
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.events import ITEMS
from components.schemas.examples import CATALOGUE, CONTEXTS, EXAMPLES
from components.storage import StageResult
from components.urm.inference import UrmRecaller
from components.urm.network.build import build_model
from components.urm.network.files import save_model
from tests.worlds import REPOSITORY
from tests.worlds.backbone import write_backbone

IDS = np.arange(1000, 1040)
CATEGORIES = ("milk", "pet food", "baby care", "[fruit]")
CUT = datetime(2017, 9, 4, 5, tzinfo=UTC)
TASKS = [
    {"name": "text_query", "description": "A wanted category.", "prompt": "Task: search for {{ query }}.",
     "target": {"query_category_level": 0}},
    {"name": "next_purchase", "description": "Next.", "prompt": "Task: what comes next."},
    {"name": "new_item", "description": "New.", "prompt": "Task: new items.",
     "target": {"history": "not_bought"}, "exclude_bought": True},
]  # fmt: skip


def category(item_id: int) -> str:
    """The leaf category of an item."""
    return CATEGORIES[item_id % len(CATEGORIES)]


def make_run(folder: Path) -> tuple[Path, RunConfig]:
    """Write the results of validate, features and sft; returns the run directory and its configuration."""
    files, run_dir = folder / "files", folder / "runs" / "tiny"
    files.mkdir()
    config = _configure(files / "backbone")
    _write_tables(files)
    _write_model(files, config)
    put(run_dir, "validate", {"items": files / "items.parquet"})
    put(run_dir, "features", {name: files / f"{name}.parquet" for name in ("catalogue", "contexts", "examples")})
    put(run_dir, "sft", {name: files / name for name in ("model", "item_table", "candidates")})
    return run_dir, config


def put(run_dir: Path, stage: str, outputs: dict[str, Path]) -> None:
    """Let a stage have succeeded with these outputs."""
    result = StageResult(
        stage=stage, config="complete_journey", fingerprint=stage, seconds=1,
        outputs={name: str(path) for name, path in outputs.items()},
        started_at=datetime.now(UTC), finished_at=datetime.now(UTC),
    )  # fmt: skip
    write_json(str(run_dir / stage / "result.json"), result.model_dump(mode="json"))


def _configure(backbone: Path) -> RunConfig:
    write_backbone(backbone, num_layers=2)
    urm = {
        "backbone": str(backbone),
        "num_layers": 1,
        "num_user_vectors": 3,
        "history_length": 6,
        "modalities": ["id", "text"],
    }
    overrides = {"tasks": TASKS, "urm": urm, "evaluation": {"k": 10}}
    return load_config(REPOSITORY / "configs" / "complete_journey.yaml", overrides)


def _write_tables(files: Path) -> None:
    random = np.random.default_rng(0)
    contexts, examples = _ask(random)
    quantiles = np.linspace(1, 0, len(IDS), dtype=np.float32)
    events = np.arange(len(IDS), 0, -1)
    catalogue = {"item_id": IDS, "train_events": events, "popularity_quantile": quantiles}
    items = [
        {"item_id": item, "external_id": str(item), "title": f"Item {item}", "category": ["shop", category(item)],
         "brand": None, "price": 1.0, "image_uri": None, "created_at": None, "available": True}
        for item in IDS.tolist()
    ]  # fmt: skip
    pq.write_table(pa.table(catalogue, schema=CATALOGUE), files / "catalogue.parquet")
    pq.write_table(pa.Table.from_pylist(items, schema=ITEMS), files / "items.parquet")
    pq.write_table(pa.Table.from_pylist(contexts, schema=CONTEXTS), files / "contexts.parquet")
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLES), files / "examples.parquet")


def _ask(random: np.random.Generator) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    contexts: list[dict[str, Any]] = []
    examples: list[dict[str, Any]] = []
    for number in range(24):
        split = ("train", "validation", "test")[number % 3]
        history = random.choice(IDS, size=int(random.integers(2, 12)), replace=False)
        contexts.append(
            {
                "context_id": number, "user_id": f"u{number % 12}", "cut_ts": CUT,
                "split": split, "history_item_ids": history.tolist(), "history_counts": [1] * len(history),
                "history_days_since": np.arange(len(history), dtype=float).tolist(),
                "history_behaviors": ["purchase"] * len(history), "num_events": len(history),
                "num_items": len(history), "num_active_days": 1, "days_since_last": 1.0, "top_categories": ["milk"],
            }
        )  # fmt: skip
        fresh = random.choice(np.setdiff1d(IDS, history), size=3, replace=False).tolist()
        answers = {"text_query": fresh[:1], "next_purchase": fresh[:2] + history[:2].tolist(), "new_item": fresh}
        for task, targets in answers.items():
            examples.append(
                {
                    "example_id": len(examples), "context_id": number, "split": split, "task": task,
                    "query": "milk" if task == "text_query" else None, "target_item_ids": targets,
                    "target_categories": sorted({category(item) for item in targets}),
                }
            )  # fmt: skip
    return contexts, examples


def _write_model(files: Path, config: RunConfig) -> None:
    random = np.random.default_rng(1)
    vectors, present = random.normal(size=(len(IDS), 8)), np.ones(len(IDS), dtype=bool)
    modalities = {"id": (vectors, present), "text": (vectors[:, :6], present), POPULARITY: (vectors[:, :1], present)}
    write_item_table(files / "item_table", IDS, modalities)
    torch.manual_seed(1)
    new = build_model(config.urm, ItemTable.open(files / "item_table"), ["purchase"], files)
    torch.nn.init.normal_(new.model.user_head.project.weight)  # untrained, it is zero: the model would not hear a word
    save_model(files / "model", new.model.eval(), new.builder.writer, new.description)
    (files / "candidates").mkdir()
    np.save(files / "candidates" / "keys.npy", IDS)
    recaller = UrmRecaller(new.model, new.builder, new.description.config.combine)
    np.save(files / "candidates" / "vectors.npy", recaller.encode_items(IDS))
