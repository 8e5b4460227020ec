"""Stage `features`: accepted events → Feast sources and online store, catalogue, contexts, examples.

1. Read the log once; count the catalogue in the training window.
2. Write the sources of the Feast views, one shard of users at a time.
3. Find every task's targets in the window after each cut; choose examples; number their contexts.
4. Fetch the contexts' features by Feast's point-in-time retrieval.
5. Materialise the online store from the same sources.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from components.config import RunConfig
from components.engines.duckdb import open_engine
from components.features import checks
from components.features.catalogue import build_catalogue
from components.features.contexts import retrieve_contexts
from components.features.log import read_log
from components.features.recent import judged_by_the_past
from components.features.sampling import build_examples, choose_examples, number_contexts
from components.features.sources import write_sources
from components.features.store import create_feature_store, materialize, offline
from components.features.targets import answers
from components.features.window import window_events
from components.schemas.examples import CATALOGUE, EXAMPLES
from components.storage import StageReport, StageRun


def run(stage: StageRun) -> StageReport:
    """Compute features and examples of a run.

    Raises:
        ConfigError: A task names what no event has, or the environment is not embedded.
        DataError: The log is empty or does not reach over the splits.
    """
    checks.require_embedded(stage.settings)
    events, items_file = stage.path("validate", "events"), stage.path("validate", "items")
    config, output = stage.config, stage.output
    folder = output / "feature_store"
    folder.mkdir()
    attributes = sorted({name for task in config.tasks for name in task.target.attributes})
    with open_engine(stage.scratch / "spill", stage.settings.num_threads) as engine:
        stage.report_progress("reading the log")
        log = read_log(engine, events, config.features.split, attributes)
        items = engine.read_parquet(str(items_file))
        checks.require_tasks_in_log(log, config.tasks)
        catalogue = engine.create_table("catalogue", build_catalogue(log, config.features))
        checks.require_catalogue(catalogue, config.features)
        _write(catalogue.order_by("item_id"), CATALOGUE, output / "catalogue.parquet")

        stage.report_progress("finding targets")
        examples, recent, contexts = _examples_and_contexts(engine, log, items, catalogue, config)
        per_task = checks.count_examples(examples, log, config)
        _write(examples.order_by("example_id"), EXAMPLES, output / "examples.parquet")
        _write(recent.order_by("example_id"), EXAMPLES, output / "recent_examples.parquet")

        stage.report_progress("writing behaviour sequences")
        rows = write_sources(log, items, config.features, folder)

        stage.report_progress("retrieving features at the cuts")
        store = create_feature_store(folder, stage.settings)
        with offline(folder):
            table = pa.concat_tables(retrieve_contexts(store, batch) for batch in _batches(contexts))
            pq.write_table(table.sort_by("context_id"), output / "contexts.parquet")
            stage.report_progress("materialising the online store")
            materialize(store, end=log.ts.max().execute().to_pydatetime() + timedelta(microseconds=1))
        counts = {
            "events": log.count().execute(),
            "users": log.user_id.nunique().execute(),
            "feature_rows": rows,
            "catalogue": catalogue.count().execute(),
            "contexts": table.num_rows,
            "examples": examples.count().execute(),
            "recent_examples": recent.count().execute(),
        }
    return StageReport(
        outputs={
            "feature_store": "feature_store",
            "catalogue": "catalogue.parquet",
            "contexts": "contexts.parquet",
            "examples": "examples.parquet",
            "recent_examples": "recent_examples.parquet",
        },
        counts={name: int(value) for name, value in counts.items()},
        metrics={"examples": per_task, "contexts": _count_by_split(table)},
    )


def _examples_and_contexts(
    engine: ibis.BaseBackend, log: ir.Table, items: ir.Table, catalogue: ir.Table, config: RunConfig
) -> tuple[ir.Table, ir.Table, ir.Table]:
    """EXAMPLES, those of the newest training cuts judged by the past, and the contexts with the users' shards."""
    features = config.features
    events = engine.create_table("window_events", window_events(log, items, catalogue, config))
    found = engine.create_table("answers", _answers(events, config))
    chosen = engine.create_table("chosen", choose_examples(found, features, config.seed))
    contexts = engine.create_table("contexts", number_contexts(chosen))
    examples = engine.create_table("examples", build_examples(found, chosen, contexts))
    judged = engine.create_table("recent_events", judged_by_the_past(events, log, catalogue, features.split))
    asked = engine.create_table("recent_answers", _answers(judged, config))
    recent = engine.create_table("recent_examples", build_examples(asked, asked, contexts))
    shards = log.select("user_id", "shard").distinct()
    return examples, recent, contexts.join(shards, "user_id")


def _answers(events: ir.Table, config: RunConfig) -> ir.Table:
    return ibis.union(*(answers(events, task, index, config) for index, task in enumerate(config.tasks)))


def _batches(contexts: ir.Table) -> list[pa.Table]:
    """Contexts by the users' shards, so that one retrieval joins a bounded number of rows."""
    table = contexts.to_pyarrow().sort_by("context_id")
    shards = table["shard"].to_numpy()
    return [table.filter(pa.array(shards == shard)).drop_columns("shard") for shard in sorted(set(shards))]


def _count_by_split(contexts: pa.Table) -> dict[str, int]:
    counted = contexts["split"].value_counts()
    return {str(row["values"]): int(row["counts"]) for row in counted.to_pylist()}


def _write(expression: ir.Table, schema: pa.Schema, path: Path) -> None:
    pq.write_table(expression.to_pyarrow().select(schema.names).cast(schema), path)
