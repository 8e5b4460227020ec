"""Stage `encode`: frozen vectors of items, as a memory-mapped item table.

Encoded are the items that occur in accepted events, available or not: the catalogue of candidates and every
history are made of such items, and an item without events can be neither. Rows are sorted by item id.
"""

import torch

from components.caches import CachePlace
from components.device import prepare_device
from components.engines.duckdb import open_engine
from components.engines.engine import require_duckdb
from components.items.content import read_items
from components.items.encoding import encode_content, write_tables
from components.storage import StageReport, StageRun


def run(stage: StageRun) -> StageReport:
    """Encode the items of a run.

    Outputs:
        item_table: Folder in the form of `components.items.table`; modalities id (in both roles, see id_vectors.py),
            popularity, text, lexical, category_words, brand, category, its kinds by level and, where the configuration
            has an image encoder, image.
        item_table_past: The same, its ID vectors and popularity those of what came before the newest training cuts; for
            training.

    Raises:
        DataError: There are no events, an event's item is unknown, or more than half of the images cannot be read.
        UnavailableError: The store of the images does not answer.
        ConfigError: The device or an encoder does not exist.
    """
    require_duckdb("encode", stage.settings)
    events, items_file = stage.path("validate", "events"), stage.path("validate", "items")
    config, device = stage.config, torch.device(prepare_device(stage.settings))
    with open_engine(stage.scratch / "duckdb", stage.settings) as engine:
        items, num_untouched = read_items(engine, events, items_file)
        stage.report_progress("items read", items=len(items))
        cache = CachePlace.of(stage.settings) / "vectors"
        content = encode_content(items, config.items, device, cache, stage.report_progress)
        num_with_id = write_tables(
            items, content.modalities, events, engine, config, stage.output, stage.report_progress
        )
    counts = content.counts | {"items_without_events": num_untouched, "items_with_id_vector": num_with_id}
    outputs = {"item_table": "item_table", "item_table_past": "item_table_past"}
    return StageReport(outputs, counts, content.metrics)
