"""A small real slice of the Complete Journey log, and short ways to run the stage."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import ibis
import pytest

from components.config import RunConfig, Source, TableSource, load_config
from components.engines.duckdb import open_engine
from components.ingestion.complete_journey import find_data
from components.settings import Settings
from tests.worlds import CONFIGS

__all__ = ["configure", "connection", "slice_dir"]  # fixtures


@pytest.fixture(scope="session")
def slice_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve households' first six weeks with all that belongs to them, in the package's own file layout."""
    data, folder = find_data(), tmp_path_factory.mktemp("complete_journey")
    engine = duckdb.connect()
    everything = engine.read_parquet(f"{data}/transactions.parquet")
    households = everything.project("household_id").distinct().order("household_id").limit(12).set_alias("households")
    everything.filter("week <= 6").join(households, "household_id", how="semi").create("sales")
    for name, rows in {
        "transactions": "sales",
        "promotions": f"'{data}/promotions.parquet' SEMI JOIN sales USING (product_id) WHERE week <= 6",
        "products": f"(FROM '{data}/products.parquet' LIMIT 50) UNION "
        f"FROM '{data}/products.parquet' SEMI JOIN sales USING (product_id)",
    }.items():
        engine.execute(f"COPY (FROM {rows}) TO '{folder}/{name}.parquet'")
    return folder


@pytest.fixture
def connection(tmp_path: Path, settings: Settings) -> Iterator[ibis.BaseBackend]:
    """An engine of its own."""
    with open_engine(tmp_path, settings) as engine:
        yield engine


@pytest.fixture
def configure() -> Callable[..., RunConfig]:
    """The default run with another source."""

    def build(source: Source, **overrides: Any) -> RunConfig:
        return load_config(CONFIGS / "complete_journey.yaml", {"source": source.model_dump(mode="json")} | overrides)

    return build


def write_csv(folder: Path, events: str, items: str = "item_id,title\n1,Sock\n") -> TableSource:
    """A source of these two files."""
    (folder / "events.csv").write_text(events)
    (folder / "items.csv").write_text(items)
    return TableSource(events=str(folder / "events.csv"), items=str(folder / "items.csv"))
