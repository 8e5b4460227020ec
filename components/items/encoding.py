"""Everything that is known of the items as vectors: encoded, computed and learned, written as the two item tables."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ibis
import numpy as np
import pyarrow as pa
import structlog
import torch

from components.caches import CachePlace
from components.config import ItemsConfig, RunConfig
from components.items.content import Modalities, describe_items, make_codes, names_of, words_of
from components.items.id_vectors import learn_id_vectors
from components.items.image import ImageEncoder, ImageVectors, encode_images
from components.items.popularity import count_popularity
from components.items.table import HISTORY_ROLE, POPULARITY, write_item_table
from components.items.text import TextEncoder, TextVectors, encode_texts, item_text
from components.memory import trim_memory

log = structlog.get_logger()

Report = Callable[..., None]  # called with a message and figures by name

_REASONS_SHOWN = 5


@dataclass(frozen=True)
class Content:
    """What the items are by themselves; counts and metrics are those of the stage's result."""

    modalities: Modalities
    counts: dict[str, int]
    metrics: dict[str, float]


def encode_content(
    items: pa.Table, config: ItemsConfig, device: torch.device, cache: CachePlace, report: Report
) -> Content:
    """Encode texts and, where the configuration has an encoder for them, images; compute the codes.

    Raises:
        DataError: More than half of the images cannot be read.
        UnavailableError: The same, since their store does not answer.
        ConfigError: An encoder does not exist.
    """
    texts = _encode_texts(items, config, device, cache, report)
    modalities = {"text": (texts.vectors, texts.present)} | make_codes(items, config)
    counts = {"items": len(items), "distinct_texts": texts.num_distinct, "cached_texts": texts.num_cached}
    metrics = _speed("text", texts.num_distinct - texts.num_cached, texts.seconds)
    if config.image_encoder:
        images = _encode_images(items, ImageEncoder(config.image_encoder, device), cache, report)
        modalities["image"] = (images.vectors, images.present)
        counts |= {
            "items_with_image": int(images.present.sum()),
            "distinct_images": images.num_images,
            "cached_images": images.num_cached,
            "unreadable_images": len(images.unreadable),
        }
        metrics |= _speed("image", images.num_images - images.num_cached, images.seconds)
    return Content(modalities, counts, metrics)


def write_tables(
    items: pa.Table,
    content: Modalities,
    events: Path,
    engine: ibis.BaseBackend,
    config: RunConfig,
    output: Path,
    report: Report,
) -> int:
    """Write `item_table`, for inference, and `item_table_past`, for training, with what the events tell of the items.

    Returns:
        How many items have an ID vector.
    """
    report("learning ID vectors")

    def report_step(name: str, step: int, steps: int, loss: float) -> None:
        report(f"learning ID vectors: {name}", step=step, steps=steps, loss=round(loss, 3))

    item_ids, words, names = items.column("item_id").to_numpy(), words_of(items), names_of(items)
    described = describe_items(items, content["text"][0])
    learned = learn_id_vectors(events, item_ids, described, config.features, config.items, config.seed, report_step)
    trim_memory()  # gigabytes of baskets and gradients, which the allocator would keep beside the counts
    counted = count_popularity(engine, events, items, config.features.split)
    if counted.now.any() and not counted.past.any():
        log.warning(
            "nothing was bought before the newest training cuts: URM learns without counts, and serves with them",
            remedy="lower features.split.recent_cuts, move train_start, or set urm.train_cuts to all",
        )
    everyone = np.ones(len(item_ids), dtype=bool)
    for name, vectors, popularity in (
        ("item_table", learned.now, counted.now),
        ("item_table_past", learned.past, counted.past),
    ):
        of_events: Modalities = {
            "id": (vectors.candidate, vectors.present),
            "id" + HISTORY_ROLE: (vectors.history, vectors.present),
            POPULARITY: (popularity, everyone),
        }
        write_item_table(output / name, item_ids, content | of_events, words, names)
    return int(learned.now.present.sum())


def _encode_texts(
    items: pa.Table, config: ItemsConfig, device: torch.device, cache: CachePlace, report: Report
) -> TextVectors:
    titles, categories = items.column("title").to_pylist(), items.column("category").to_pylist()
    texts = [item_text(title, category) for title, category in zip(titles, categories, strict=True)]
    encoder = TextEncoder(config.text_encoder, device, config.batch_size)
    clock = time.monotonic()

    def report_texts(done: int, total: int) -> None:
        speed = round(done / (time.monotonic() - clock), 1)
        report("encoding texts", done=done, total=total, texts_per_second=speed)

    return encode_texts(texts, encoder, cache, report_texts)


def _encode_images(items: pa.Table, encoder: ImageEncoder, cache: CachePlace, report: Report) -> ImageVectors:
    def report_images(done: int, total: int) -> None:
        report("encoding images", done=done, total=total)

    images = encode_images(items.column("image_uri").to_pylist(), encoder, cache, report_images)
    if not images.num_images:
        log.warning(
            "no item has an image, though the configuration has an encoder of images",
            remedy="map a column to image_uri in source.item_columns, or leave items.image_encoder empty",
        )
    for uri, reason in list(images.unreadable.items())[:_REASONS_SHOWN]:
        log.warning("image cannot be read", uri=uri, reason=reason)
    if images.unreadable:
        report("some images cannot be read", unreadable=len(images.unreadable))
    if images.num_unanswered:
        log.warning(
            "the store of some images gave no answer, and their items go without",
            images=images.num_unanswered,
            remedy="once it answers, `urm encode --force`, or the next run with new data",
        )
    return images


def _speed(kind: str, num_encoded: int, seconds: float) -> dict[str, float]:
    """Metrics of an encoder; no rate where everything came from the cache."""
    metrics = {f"{kind}_seconds": round(seconds, 3)}
    if num_encoded:
        metrics[f"{kind}s_per_second"] = round(num_encoded / seconds, 1)
    return metrics
