"""A run directory up to `sft` on a tiny world: 60 items of four categories, 16 users, an untrained URM.

Baselines' predictions are drawn by chance. Studies and the stages after `sft` may run in it.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from components.caches import CachePlace
from components.config import RunConfig, load_config
from components.items.table import POPULARITY, ItemTable, write_item_table
from components.schemas.events import ITEMS
from components.schemas.examples import CONTEXTS, EXAMPLES
from components.schemas.predictions import PREDICTIONS
from components.settings import Settings
from components.urm.inference import UrmRecaller
from components.urm.network.build import build_model
from components.urm.network.files import save_model
from tests.worlds import CONFIGS
from tests.worlds.backbone import write_backbone
from tests.worlds.tables import Row, add_examples, catalogue_table, context_row, item_row, put, write
from tests.worlds.vectors import write_candidates

__all__ = ["finished", "settings"]  # fixtures

IDS = np.arange(1000, 1060)
CATEGORIES = ("milk", "pet food", "baby care", "[fruit]")
BASELINES = ("popularity", "own_history", "sasrec", "target_attention", "some_other")  # any the stage may write
TASKS = [
    {"name": "text_query", "description": "A wanted category.", "prompt": "Task: search for {{ query }}.",
     "target": {"query_category_level": 0}},
    {"name": "next_purchase", "description": "Next.", "prompt": "Task: what comes next."},
    {"name": "new_item", "description": "New.", "prompt": "Task: new items.",
     "target": {"history": "not_bought"}, "exclude_bought": True},
    {"name": "long_tail", "description": "Rare; nobody in this world buys so.", "prompt": "Task: rare items."},
]  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, RunConfig]:
    """A run with validate, features, baseline and sft done; its directory and configuration."""
    return make_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def settings(settings: Settings, configs: Path) -> Settings:
    """With a copy of the configurations to be spoilt."""
    return settings.model_copy(update={"configs_dir": configs})


def category(item_id: int) -> str:
    """The leaf category of an item."""
    return CATEGORIES[item_id % len(CATEGORIES)]


def make_run(folder: Path) -> tuple[Path, RunConfig]:
    """Write the results of the stages up to sft; returns the run directory `runs/tiny` and its configuration.

    The files themselves lie in `files`.
    """
    files, run_dir = folder / "files", folder / "runs" / "tiny"
    urm = {
        "backbone": str(write_backbone(files / "backbone", num_layers=2)), "num_layers": 1, "num_user_vectors": 3,
        "fusion_dimension": 16, "history_length": 6, "copy_length": 8, "modalities": ["id", "text"],
    }  # fmt: skip
    overrides = {"tasks": TASKS, "urm": urm, "evaluation": {"k": 10, "bootstrap_samples": 200}}
    config = load_config(CONFIGS / "complete_journey.yaml", overrides)
    tables = _write_tables(files)
    _write_model(files, config)
    put(run_dir, "validate", {"items": tables["items"]})
    put(run_dir, "features", {name: tables[name] for name in ("catalogue", "contexts", "examples")})
    training = {"target_attention": {"stopped_by": "epochs"}, "sasrec": {"stopped_by": "time"}}
    put(run_dir, "baseline", {"predictions": tables["predictions"]}, metrics={"training": training})
    put(run_dir, "sft", {name: files / name for name in ("model", "item_table", "candidates")})
    return run_dir, config


def _write_tables(files: Path) -> dict[str, Path]:
    random = np.random.default_rng(0)
    contexts, examples = _ask(random)
    lists = [
        {"example_id": row["example_id"], "model": model, "item_ids": random.permutation(IDS)[:30],
         "scores": np.arange(30, 0, -1.0)}
        for model in BASELINES for row in examples if row["split"] == "test"
    ]  # fmt: skip
    items = [item_row(item, title=f"Item {item}", category=["shop", category(item)]) for item in IDS.tolist()]
    pq.write_table(catalogue_table(IDS, np.maximum(0, np.arange(57, -3, -1))), files / "catalogue.parquet")
    return {
        "catalogue": files / "catalogue.parquet",  # its last items are new
        "items": write(files / "items.parquet", ITEMS, items),
        "contexts": write(files / "contexts.parquet", CONTEXTS, contexts),
        "examples": write(files / "examples.parquet", EXAMPLES, examples),
        "predictions": write(files / "predictions.parquet", PREDICTIONS, lists),
    }


def _ask(random: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Eight contexts of each split before the test, which has 32, in turn."""
    contexts: list[Row] = []
    examples: list[Row] = []
    for number in range(48):
        split = ("train", "validation", "test", "test", "test", "test")[number % 6]
        history = random.choice(IDS, size=int(random.integers(2, 12)), replace=False)
        contexts.append(context_row(number, split, history, user_id=f"u{number % 16}"))
        fresh = random.choice(np.setdiff1d(IDS, history), size=3, replace=False).tolist()
        answers = {"text_query": fresh[:1], "next_purchase": fresh[:2] + history[:2].tolist(), "new_item": fresh}
        for task, targets in answers.items():
            categories = sorted({category(item) for item in targets})
            add_examples(examples, contexts[-1], {task: targets}, target_categories=categories)
    return contexts, examples


def _write_model(files: Path, config: RunConfig) -> None:
    random = np.random.default_rng(1)
    vectors, present = random.normal(size=(len(IDS), 8)), np.ones(len(IDS), dtype=bool)
    modalities = {"id": (vectors, present), "text": (vectors[:, :6], present), POPULARITY: (vectors[:, :1], present)}
    write_item_table(files / "item_table", IDS, modalities)
    torch.manual_seed(1)
    new = build_model(config.urm, ItemTable.open(files / "item_table"), ["purchase"], CachePlace(files))
    torch.nn.init.normal_(new.model.user_head.project.weight)  # untrained, it is zero: the model would not hear a word
    save_model(files / "model", new.model.eval(), new.builder.writer, new.description)
    write_candidates(files / "candidates", UrmRecaller(new.model, new.builder, new.description.config.combine), IDS)
