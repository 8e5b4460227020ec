"""A model of one shop on the items of another: what it is asked, and what is compared."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from benchmarks.transfer import RIVALS, TEXT, measure, move, summarise
from components.caches import CachePlace
from components.config import UrmConfig
from components.exceptions import DataError
from components.items.table import HISTORY_ROLE, POPULARITY, ItemTable, write_item_table
from components.studies.finished import FinishedRun
from components.urm.network.build import build_model
from components.urm.network.files import save_model
from tests.worlds import make_settings
from tests.worlds.backbone import write_backbone
from tests.worlds.baseline import *  # noqa: F403  # fixtures
from tests.worlds.baseline import finish_stages


def train_elsewhere(folder: Path, world, modalities: tuple[str, ...]) -> Path:
    """Folder of an untrained model whose shop sells items that are not in this world, with images."""
    width = ItemTable.open(world.folder / "item_table").modalities[TEXT].vectors.shape[1]
    everything, random = np.ones(8, dtype=bool), np.random.default_rng(0)
    widths = {TEXT: width, "id": 16, "id" + HISTORY_ROLE: 16, POPULARITY: 2, "image": 4}
    vectors = {name: (random.random((8, size)), everything) for name, size in widths.items()}
    write_item_table(folder / "table", np.arange(1, 9), vectors)
    model = {"backbone": str(write_backbone(folder / "backbone", 1)), "num_layers": 1, "num_user_vectors": 2}
    model |= {"fusion_dimension": 16, "modalities": modalities, "query_meaning": False}
    torch.manual_seed(0)
    config = UrmConfig.model_validate(world.config.urm.model_dump() | model)
    new = build_model(config, ItemTable.open(folder / "table"), ["purchase"], CachePlace(folder))
    save_model(folder / "model", new.model, new.builder.writer, new.description)
    return folder / "model"


def test_a_model_ranks_the_items_of_a_shop_it_has_never_seen(world, tmp_path: Path) -> None:
    finish_stages(world, tmp_path / "run")
    run = FinishedRun(str(tmp_path / "run"), make_settings(tmp_path / "home"))
    recalls = measure(world.config, run, {"others": train_elsewhere(tmp_path, world, (TEXT,))})
    examples = pq.read_table(world.folder / "examples.parquet").to_pandas().query("split == 'validation'")
    owners = pq.read_table(world.folder / "contexts.parquet").to_pandas().set_index("context_id")["user_id"]
    for model in ("others", *RIVALS):
        asked = recalls[recalls["model"] == model].set_index("example_id").loc[examples["example_id"]]
        assert list(asked["task"]) == list(examples["task"])
        assert list(asked["user_id"]) == list(owners[examples["context_id"]])
    figures = summarise(recalls, first="others")
    means = recalls.groupby(["model", "task"])["recall"].mean()
    for against in (TEXT, "others"):
        assert figures[against][against]["mean"]["difference"] == 0 == figures[against][against]["mean"]["low"]
        for model in ("others", "item_knn"):
            expected = means[model] - means[against]
            found = {task: of_task["difference"] for task, of_task in figures[against][model].items()}
            assert found == pytest.approx(dict(expected) | {"mean": expected.mean()})
    assert means["others"].max() > 0


def test_a_model_that_reads_what_the_shop_lacks_is_refused(world, tmp_path: Path) -> None:
    model = train_elsewhere(tmp_path, world, (TEXT, "image"))
    item_ids = pq.read_table(world.folder / "catalogue.parquet")["item_id"].to_numpy()
    with pytest.raises(DataError, match="image"):
        move(model, world.folder / "item_table", item_ids, "cpu")
