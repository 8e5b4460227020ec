"""A tiny world: 60 items, 12 users, a Llama of random weights, and everything URM needs around them."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from components.caches import CachePlace
from components.config import RunConfig, load_config
from components.items.codes import name_hashes
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.examples import CONTEXTS, EXAMPLES
from components.urm.data.batch import Batch
from components.urm.data.examples import Groups
from components.urm.network.build import NewModel, build_model
from components.urm.training.steps import NegativeSampler, TrainingSteps
from tests.worlds import CONFIGS
from tests.worlds.backbone import byte_tokenizer, write_backbone
from tests.worlds.tables import Row, add_examples, catalogue_table, context_row

__all__ = ["backbone_dir", "config", "groups", "new_model", "steps", "table_dir", "tables", "tokenizer"]  # fixtures

NUM_ITEMS = 60
FIRST_ITEM = 1000
CATEGORIES = ("milk", "bread", "fruit")
NEW_ITEMS = {"target": {"history": "not_bought"}, "exclude_bought": True}
TASKS = [
    {"name": "next_purchase", "description": "What comes next.", "prompt": "Task: what comes next."},
    {"name": "new_item", "description": "New items.", "prompt": "Task: new items."} | NEW_ITEMS,
    {"name": "text_query", "description": "A wanted category.", "prompt": "Task: search for {{ query }}."}
    | {"target": {"query_category_level": 0}},
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
        counts = rng.integers(1, 6, len(history)).tolist()
        days = np.sort(rng.uniform(0, 60, len(history))).tolist()
        known = {"history_counts": counts, "history_days_since": days, "num_events": 3 * len(history)}
        split, category = "train" if number < 16 else "validation", CATEGORIES[number % 3]
        profile = {"user_id": f"u{number % 12}", "num_active_days": 4, "days_since_last": 2.0}
        contexts.append(context_row(number, split, history, **known, **profile, top_categories=[category]))
        for task in TASKS:
            fresh = [int(item) for item in rng.choice(ids, size=3, replace=False) if item not in history]
            targets = (fresh or [int(ids[0])]) if task["name"] == "new_item" else history[:2]
            add_examples(examples, contexts[-1], {task["name"]: targets}, target_categories=[category, "bread"])
    return SimpleNamespace(
        catalogue=catalogue_table(ids, np.arange(NUM_ITEMS, 0, -1)),
        contexts=pa.Table.from_pylist(contexts, schema=CONTEXTS),
        examples=pa.Table.from_pylist(examples, schema=EXAMPLES),
        item_ids=ids,
    )


@pytest.fixture(scope="session")
def table_dir(tmp_path_factory: pytest.TempPathFactory, tables: SimpleNamespace) -> Path:
    """An item table with the modalities id (absent for the last five items), text and three kinds."""
    rng = np.random.default_rng(1)
    folder = tmp_path_factory.mktemp("item_table")
    everyone = np.ones(NUM_ITEMS, dtype=bool)
    modalities = {
        "id": (rng.normal(size=(NUM_ITEMS, 8)), np.arange(NUM_ITEMS) < NUM_ITEMS - 5),
        "text": (rng.normal(size=(NUM_ITEMS, 12)), everyone),
        "category_0": (np.eye(3)[np.arange(NUM_ITEMS) % 3], everyone),
        POPULARITY: (np.log1p(np.arange(NUM_ITEMS, 0, -1))[:, None], everyone),
    }
    write_item_table(folder, tables.item_ids, modalities, names={"category_0": name_hashes(CATEGORIES)})
    return folder


@pytest.fixture(scope="session")
def config(backbone_dir: Path) -> RunConfig:
    """A run of a tiny URM."""
    model = {"backbone": str(backbone_dir), "num_layers": 2, "num_user_vectors": 3, "fusion_dimension": 16}
    model["query_meaning"] = False  # the texts of this world are of no encoder
    batches = {"history_length": 6, "copy_length": 8, "num_negatives": 32, "contexts_per_batch": 4}
    steps = {"max_steps": 6, "eval_steps": 3, "validation_contexts": 4}
    overrides = {"tasks": TASKS, "evaluation.k": 10, "features.split.recent_cuts": 52}
    return load_config(CONFIGS / "complete_journey.yaml", overrides | {"urm": model | batches | steps})


@pytest.fixture
def new_model(config: RunConfig, table_dir: Path, tables: SimpleNamespace, tmp_path: Path) -> NewModel:
    """A model before training."""
    torch.manual_seed(1)
    new = build_model(config.urm, ItemTable.open(table_dir), ["purchase"], CachePlace(tmp_path))
    new.model.eval()
    return new


@pytest.fixture
def groups(tables: SimpleNamespace, config: RunConfig) -> Groups:
    """The contexts of training with their examples."""
    return keep_examples(tables, config, lambda context, place: True)


def keep_examples(tables: SimpleNamespace, config: RunConfig, keep: Callable[[int, int], bool]) -> Groups:
    """Of the contexts of training those examples that are kept by their context's number and their place in it."""
    kept = [keep(*divmod(row, len(TASKS))) for row in range(len(tables.examples))]
    examples = tables.examples.filter(pa.array(kept))
    return Groups(tables.contexts, examples, {task.name: task for task in config.tasks}, "train")


@pytest.fixture
def steps(groups: Any, new_model: NewModel, tables: SimpleNamespace, config: RunConfig) -> TrainingSteps:
    sampler = NegativeSampler(tables.catalogue, config.urm.num_negatives, config.urm.negative_power)
    return TrainingSteps(groups, new_model.builder, sampler, config)


def build_batch(new: NewModel, groups: Any) -> Batch:
    """The batch of all blocks of these contexts, with their texts."""
    write = new.builder.writer.block
    prompts = [(c, [write(e.request.task, e.request.query, e.categories) for e in asked]) for c, asked in groups]
    return new.builder.build(prompts)[0]
