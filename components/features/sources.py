"""Parquet sources of the Feast views, written one shard of users at a time."""

from contextlib import ExitStack
from pathlib import Path

import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from components.config import FeaturesConfig
from components.features.categories import word_label
from components.features.histories import behavior_sequence, select_rows, user_statistics
from components.features.store import BEHAVIOR_SEQUENCE, USER_STATISTICS


def write_sources(log: ir.Table, items: ir.Table, features: FeaturesConfig, folder: Path) -> int:
    """Write one file per view to the folder, rows sorted by user and instant; returns the number of rows per file."""
    words = items.select("item_id", category=word_label(items.category))
    writers: dict[str, pq.ParquetWriter] = {}
    num_rows = 0
    with ExitStack() as stack:
        for shard in range(int(log.shard.max().execute()) + 1):
            tables = _shard_tables(log.filter(log.shard == shard), words, features)
            for name, table in tables.items():
                if name not in writers:
                    writers[name] = stack.enter_context(pq.ParquetWriter(folder / f"{name}.parquet", table.schema))
                writers[name].write_table(table)
            num_rows += tables[USER_STATISTICS].num_rows
    return num_rows


def _shard_tables(log: ir.Table, words: ir.Table, features: FeaturesConfig) -> dict[str, pa.Table]:
    with log.left_join(words, "item_id").drop("item_id_right").cache() as events:
        with select_rows(events, features.split.train_start).cache() as rows:
            return {
                BEHAVIOR_SEQUENCE: behavior_sequence(rows, events, features.history_length).to_pyarrow(),
                USER_STATISTICS: user_statistics(rows, events).to_pyarrow(),
            }
