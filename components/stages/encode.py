"""Stage `encode`: frozen text and image vectors of items, as a memory-mapped item table.

Encoded are the items that occur in accepted events, available or not: the catalogue of candidates and every
history are made of such items, and an item nobody ever touched can be neither. Rows are sorted by item id.
"""

from __future__ import annotations

import time

import numpy as np
import pyarrow as pa
import structlog
import torch

from components.config import ItemsConfig
from components.device import prepare_device
from components.items.content import Modalities, describe_items, make_codes, read_items, words_of
from components.items.id_vectors import learn_id_vectors
from components.items.image import ImageEncoder, ImageVectors, encode_images
from components.items.popularity import count_popularity
from components.items.table import HISTORY_ROLE, POPULARITY, write_item_table
from components.items.text import TextEncoder, TextVectors, encode_texts, item_text
from components.storage import StageReport, StageRun

log = structlog.get_logger()


_REASONS_SHOWN = 5


def run(stage: StageRun) -> StageReport:
    """Encode the items of a run.

    Outputs:
        item_table: Folder in the form of `components.items.table`; modalities id (in both roles, see id_vectors.py),
            popularity, text, lexical, category_words, brand, category and, where the configuration has an image
            encoder, image.
        item_table_past: The same, its ID vectors and popularity those of what came before the newest training cuts; for
            training.

    Raises:
        DataError: There are no events, an event's item is unknown, or no image can be read.
        ConfigError: The device or an encoder does not exist.
    """
    device = torch.device(prepare_device(stage.settings))
    items, num_untouched = read_items(stage.path("validate", "events"), stage.path("validate", "items"))
    config = stage.config.items
    stage.report_progress("items read", items=len(items))

    texts = _encode_texts(stage, config, items, device)
    modalities = {"text": (texts.vectors, texts.present)} | make_codes(items, config)
    counts = {
        "items": len(items),
        "items_without_events": num_untouched,
        "distinct_texts": texts.num_distinct,
        "cached_texts": texts.num_cached,
    }
    metrics = _speed("text", texts.num_distinct - texts.num_cached, texts.seconds)
    if config.image_encoder:
        images = _encode_images(stage, config, items, device)
        modalities["image"] = (images.vectors, images.present)
        counts |= {
            "items_with_image": int(images.present.sum()),
            "distinct_images": images.num_images,
            "cached_images": images.num_cached,
            "unreadable_images": len(images.unreadable),
        }
        metrics |= _speed("image", images.num_images - images.num_cached, images.seconds)
    counts["items_with_id_vector"] = _write_tables(stage, items, modalities)
    outputs = {"item_table": "item_table", "item_table_past": "item_table_past"}
    return StageReport(outputs=outputs, counts=counts, metrics=metrics)


def _write_tables(stage: StageRun, items: pa.Table, modalities: Modalities) -> int:
    """Write the table for inference and that for training; returns how many items have an ID vector."""
    stage.report_progress("learning ID vectors")

    def report(name: str, step: int, steps: int, loss: float) -> None:
        stage.report_progress(f"learning ID vectors: {name}", step=step, steps=steps, loss=round(loss, 3))

    item_ids = items.column("item_id").to_numpy()
    words = words_of(items)
    events, features = stage.path("validate", "events"), stage.config.features
    known = learn_id_vectors(
        events,
        item_ids,
        describe_items(items, modalities["text"][0]),
        features,
        stage.config.items,
        stage.config.seed,
        report,
    )
    counted = count_popularity(events, items, features.split)
    for name, vectors, popularity in (
        ("item_table", known.now, counted.now),
        ("item_table_past", known.past, counted.past),
    ):
        everyone = np.ones(len(item_ids), dtype=bool)
        of_events: Modalities = {
            "id": (vectors.candidate, vectors.present),
            "id" + HISTORY_ROLE: (vectors.history, vectors.present),
            POPULARITY: (popularity, everyone),
        }
        write_item_table(stage.output / name, item_ids, modalities | of_events, words)
    return int(known.now.present.sum())


def _encode_texts(stage: StageRun, config: ItemsConfig, items: pa.Table, device: torch.device) -> TextVectors:
    titles, categories = items.column("title").to_pylist(), items.column("category").to_pylist()
    texts = [item_text(title, category) for title, category in zip(titles, categories, strict=True)]
    encoder = TextEncoder(config.text_encoder, device, config.batch_size)
    clock = time.monotonic()

    def report(done: int, total: int) -> None:
        speed = round(done / (time.monotonic() - clock), 1)
        stage.report_progress("encoding texts", done=done, total=total, texts_per_second=speed)

    return encode_texts(texts, encoder, stage.settings.cache_path / "vectors", report)


def _encode_images(stage: StageRun, config: ItemsConfig, items: pa.Table, device: torch.device) -> ImageVectors:
    encoder = ImageEncoder(config.image_encoder or "", device)

    def report(done: int, total: int) -> None:
        stage.report_progress("encoding images", done=done, total=total)

    images = encode_images(
        items.column("image_uri").to_pylist(), encoder, stage.settings.cache_path / "vectors", report
    )
    for uri, reason in list(images.unreadable.items())[:_REASONS_SHOWN]:
        log.warning("image cannot be read", uri=uri, reason=reason)
    if images.unreadable:
        stage.report_progress("some images cannot be read", unreadable=len(images.unreadable))
    return images


def _speed(kind: str, num_encoded: int, seconds: float) -> dict[str, float]:
    """Metrics of an encoder; no rate where everything came from the cache."""
    metrics = {f"{kind}_seconds": round(seconds, 3)}
    if num_encoded:
        metrics[f"{kind}s_per_second"] = round(num_encoded / seconds, 1)
    return metrics
