"""Stage `features`: accepted events → Feast sources and online store, catalogue, contexts, examples.

1. Read the log once, and write it by shards of users; count the catalogue in the training window.
2. Find every task's targets in the window after each cut; choose examples; number their contexts.
3. Write the sources of the Feast views.
4. Fetch the contexts' features by Feast's point-in-time retrieval.
5. Fill the online store from the same sources.

All but the counts of 1 take one shard, or one batch of rows, after another.
"""

import shutil
from datetime import timedelta
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from components.engines.engine import holds_joins, memory_limit, open_engine, read_folder
from components.features import checks
from components.features.catalogue import build_catalogue
from components.features.contexts import retrieve_contexts, split_contexts
from components.features.examples import make_examples
from components.features.log import read_log
from components.features.sources import write_sources
from components.features.store import create_feature_store, materialize, offline
from components.schemas.examples import CATALOGUE, CONTEXTS, EXAMPLES
from components.storage import StageReport, StageRun

_BATCH_ROWS = 65_536  # of a file, which is written row group by row group


def run(stage: StageRun) -> StageReport:
    """Compute features and examples of a run.

    Raises:
        ConfigError: A task names what no event has.
        DataError: The log is empty or does not reach over the splits.
        UnavailableError: A service of the production feature store does not answer.
    """
    events, items_file = stage.path("validate", "events"), stage.path("validate", "items")
    config, output = stage.config, stage.output
    folder = output / "feature_store"
    folder.mkdir()
    attributes = sorted({name for task in config.tasks for name in task.target.attributes})
    with open_engine(stage.scratch / "spill", stage.settings) as engine:
        report = stage.report_progress
        report("reading the log")
        log = read_log(engine, events, config.features.split, attributes, stage.scratch / "log", report)
        items = engine.read_parquet(str(items_file))
        checks.require_tasks_in_log(log, config.tasks)
        checks.require_covered_windows(log, config.features.split)
        catalogue = engine.create_table("catalogue", build_catalogue(log, config.features))
        checks.require_catalogue(catalogue, config.features)
        _write(catalogue.order_by("item_id"), CATALOGUE, output / "catalogue.parquet")

        examples, recent, contexts = make_examples(engine, log, items, catalogue, config, report)
        per_task = checks.count_examples(examples, log, config)
        _write(examples.order_by("example_id"), EXAMPLES, output / "examples.parquet")
        _write(recent.order_by("example_id"), EXAMPLES, output / "recent_examples.parquet")

        rows = write_sources(log, items, config.features, folder, report)

        report("retrieving features at the cuts")
        store = create_feature_store(folder, stage.settings, version=stage.folder.rpartition("/")[2])
        with offline(folder):
            limit, held = memory_limit(engine), holds_joins(engine)
            batches = split_contexts(contexts, config.features, limit, join_is_held=held)
            parts = stage.scratch / "contexts"
            shutil.rmtree(parts, ignore_errors=True)  # of a killed attempt
            parts.mkdir()
            for number, batch in enumerate(batches):
                pq.write_table(retrieve_contexts(store, batch), parts / f"{number}.parquet")
            retrieved = read_folder(engine, parts)
            _write(retrieved.order_by("context_id"), CONTEXTS, output / "contexts.parquet")
            report("filling the online store")
            materialize(store, end=log.ts.max().execute().to_pydatetime() + timedelta(microseconds=1), report=report)
        of_splits = {row.split: int(row.n) for row in retrieved.split.value_counts(name="n").execute().itertuples()}
        counts = {
            "events": log.count().execute(),
            "users": log.user_id.nunique().execute(),
            "feature_rows": rows,
            "catalogue": catalogue.count().execute(),
            "contexts": sum(of_splits.values()),
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
        metrics={"examples": per_task, "contexts": of_splits},
    )


def _write(expression: ir.Table, schema: pa.Schema, path: Path) -> None:
    with pq.ParquetWriter(path, schema) as writer:
        for batch in expression.select(schema.names).to_pyarrow_batches(chunk_size=_BATCH_ROWS):
            writer.write_batch(batch.cast(schema))
