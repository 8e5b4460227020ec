"""Parquet sources of the Feast views, written one shard of users at a time."""

from contextlib import ExitStack
from pathlib import Path

import ibis.expr.types as ir
import pyarrow.parquet as pq

from components.config import FeaturesConfig
from components.features.categories import word_label
from components.features.histories import behavior_sequence, select_rows, user_statistics
from components.features.log import parts
from components.features.store import BEHAVIOR_SEQUENCE, USER_STATISTICS
from components.progress import Report

BATCH_ROWS = 8192  # also a row group: retrieval and back-fill read those of the users they ask about


def write_sources(log: ir.Table, items: ir.Table, features: FeaturesConfig, folder: Path, report: Report) -> int:
    """Write one file per view to the folder, rows sorted by user and instant; returns the number of rows per file."""
    writers: dict[str, pq.ParquetWriter] = {}
    num_rows = 0
    with ExitStack() as stack, items.select("item_id", category=word_label(items.category)).cache() as words:
        for _, part in parts(log, "writing behaviour sequences", report):
            with (
                part.left_join(words, "item_id").drop("item_id_right").cache() as events,
                select_rows(events, features.split.train_start).cache() as rows,
            ):
                views = {
                    BEHAVIOR_SEQUENCE: behavior_sequence(rows, events, features.history_length),
                    USER_STATISTICS: user_statistics(rows, events),
                }
                for name, view in views.items():
                    if name not in writers:
                        path, schema = folder / f"{name}.parquet", view.schema().to_pyarrow()
                        writers[name] = stack.enter_context(pq.ParquetWriter(path, schema))
                    for batch in view.to_pyarrow_batches(chunk_size=BATCH_ROWS):
                        writers[name].write_batch(batch)
                num_rows += int(rows.count().execute())
    return num_rows
