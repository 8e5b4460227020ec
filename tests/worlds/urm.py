"""A tiny world: 60 items, 12 users, a Llama of random weights, and everything URM needs around them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from components.config import RunConfig, load_config
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.examples import CONTEXTS, EXAMPLES
from components.urm.network.build import NewModel, build_model
from tests.worlds import CONFIGS
from tests.worlds.backbone import byte_tokenizer, write_backbone
from tests.worlds.tables import Row, add_examples, catalogue_table, context_row

__all__ = ["backbone_dir", "config", "new_model", "table_dir", "tables", "tokenizer"]  # fixtures

NUM_ITEMS = 60
FIRST_ITEM = 1000
CATEGORIES = ("milk", "bread", "fruit")
TASKS = [
    {"name": "next_purchase", "description": "What comes next.", "prompt": "Task: what comes next."},
    {
        "name": "new_item",
        "description": "New items.",
        "prompt": "Task: new items.",
        "target": {"history": "not_bought"},
        "exclude_bought": True,
    },
    {
        "name": "text_query",
        "description": "A wanted category.",
        "prompt": "Task: search for {{ query }}.",
        "target": {"query_category_level": 0},
    },
]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens."""
    return byte_tokenizer()


@pytest.fixture(scope="session")
def backbone_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model as transformers writes it."""
    return write_backbone(tmp_path_factory.mktemp("backbone"), num_layers=3)


@pytest.fixture(scope="session")
def tables() -> SimpleNamespace:
    """Catalogue, contexts and examples: every user goes on buying from the history."""
    rng = np.random.default_rng(0)
    ids = np.arange(FIRST_ITEM, FIRST_ITEM + NUM_ITEMS)
    contexts: list[Row] = []
    examples: list[Row] = []
    for number in range(24):
        history = rng.choice(ids, size=int(rng.integers(1, 12)), replace=False).tolist()
        contexts.append(
            context_row(
                number,
                "train" if number < 16 else "validation",
                history,
                user_id=f"u{number % 12}",
                history_counts=rng.integers(1, 6, len(history)).tolist(),
                history_days_since=np.sort(rng.uniform(0, 60, len(history))).tolist(),
                num_events=3 * len(history),
                num_active_days=4,
                days_since_last=2.0,
                top_categories=[CATEGORIES[number % 3]],
            )
        )
        for task in TASKS:
            fresh = [int(item) for item in rng.choice(ids, size=3, replace=False) if item not in history]
            targets = (fresh or [int(ids[0])]) if task["name"] == "new_item" else history[:2]
            add_examples(
                examples, contexts[-1], {task["name"]: targets}, target_categories=[CATEGORIES[number % 3], "bread"]
            )
    return SimpleNamespace(
        catalogue=catalogue_table(ids, np.arange(NUM_ITEMS, 0, -1)),
        contexts=pa.Table.from_pylist(contexts, schema=CONTEXTS),
        examples=pa.Table.from_pylist(examples, schema=EXAMPLES),
        item_ids=ids,
    )


@pytest.fixture(scope="session")
def table_dir(tmp_path_factory: pytest.TempPathFactory, tables: SimpleNamespace) -> Path:
    """An item table with the modalities id (absent for the last five items) and text."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("item_table")
    present = np.arange(NUM_ITEMS) < NUM_ITEMS - 5
    write_item_table(
        folder,
        tables.item_ids,
        {
            "id": (rng.normal(size=(NUM_ITEMS, 8)), present),
            "text": (rng.normal(size=(NUM_ITEMS, 12)), np.ones(NUM_ITEMS, dtype=bool)),
            POPULARITY: (np.log1p(np.arange(NUM_ITEMS, 0, -1))[:, None], np.ones(NUM_ITEMS, dtype=bool)),
        },
    )
    return folder


@pytest.fixture(scope="session")
def config(backbone_dir: Path) -> RunConfig:
    """A run of a tiny URM."""
    return load_config(
        CONFIGS / "complete_journey.yaml",
        {
            "tasks": TASKS,
            "evaluation.k": 10,
            "features.split.recent_cuts": 52,
            "urm": {
                "backbone": str(backbone_dir),
                "num_layers": 2,
                "num_user_vectors": 3,
                "fusion_dimension": 16,
                "history_length": 6,
                "copy_length": 8,
                "num_negatives": 32,
                "contexts_per_batch": 4,
                "max_steps": 6,
                "eval_steps": 3,
                "validation_contexts": 4,
            },
        },
    )


@pytest.fixture
def new_model(config: RunConfig, table_dir: Path, tables: SimpleNamespace, tmp_path: Path) -> NewModel:
    """A model before training."""
    torch.manual_seed(1)
    new = build_model(config.urm, ItemTable.open(table_dir), ["purchase"], tmp_path)
    new.model.eval()
    return new
