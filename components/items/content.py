"""What there is to encode of the items: their rows, texts, words, brands and categories."""

from pathlib import Path

import ibis
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from components.config import ItemsConfig
from components.engines.duckdb import read_folder
from components.exceptions import DataError
from components.items.codes import Words, attribute_vectors, lexical_vectors, list_words
from components.items.id_network import ItemContent
from components.items.kinds import kind_names, kind_vectors

Modalities = dict[str, tuple[npt.NDArray[np.floating], npt.NDArray[np.bool_]]]


def read_items(engine: ibis.BaseBackend, events: Path, items: Path) -> tuple[pa.Table, int]:
    """Items that occur in events, from the folder of accepted events and the file of accepted items.

    Returns:
        Columns item_id, title, category, brand, image_uri, sorted by item_id; and how many items no event names.

    Raises:
        DataError: There are no events, or an event names an item that is not in the items table.
    """
    catalogue = engine.read_parquet(items)
    touched = read_folder(engine, events).select("item_id").distinct()
    unknown = touched.anti_join(catalogue, "item_id").item_id.to_pyarrow()
    if len(unknown):
        raise DataError(
            "accepted events",
            expected="items of the items table only",
            got=f"item {unknown[0]} ({len(unknown)} unknown in all)",
            remedy="run `urm validate` again",
        )
    columns = catalogue.semi_join(touched, "item_id").select("item_id", "title", "category", "brand", "image_uri")
    table = columns.order_by("item_id").to_pyarrow()
    if not len(table):
        raise DataError("accepted events", expected="at least one", got="none", remedy="check the source")
    return table, int(catalogue.count().execute()) - len(table)


def describe_items(items: pa.Table, text: npt.NDArray[np.floating]) -> ItemContent:
    """Text, category (its whole path) and brand of the items, for the ID network."""
    columns = [pa.array(_categories(items), pa.string()), items.column("brand").combine_chunks()]
    numbers = [column.dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64) + 1 for column in columns]
    return ItemContent(text, np.stack(numbers, axis=1))


def make_codes(items: pa.Table, config: ItemsConfig) -> Modalities:
    """Modalities that are computed, not encoded: words of title and brand, of the category; brand; category; kinds."""
    texts = _texts_of_words(items)
    return {
        "lexical": lexical_vectors(texts["lexical"], config.lexical_dimension),
        "category_words": lexical_vectors(texts["category_words"], config.lexical_dimension // 2),
        "brand": attribute_vectors(items.column("brand").to_pylist(), config.attribute_dimension),
        "category": attribute_vectors(_categories(items), config.attribute_dimension),
        **kind_vectors(items.column("category").to_pylist()),
    }


def words_of(items: pa.Table) -> dict[str, Words]:
    """The words that each modality of words is made of."""
    return {name: list_words(texts) for name, texts in _texts_of_words(items).items()}


def names_of(items: pa.Table) -> dict[str, Words]:
    """The names of the columns of each modality that has one column per category."""
    return kind_names(items.column("category").to_pylist())


def _texts_of_words(items: pa.Table) -> dict[str, list[str]]:
    """By modality what it takes its words from: title and brand of each item, or its category path."""
    titles, brands = items.column("title").to_pylist(), items.column("brand").to_pylist()
    return {
        "lexical": [f"{title or ''} {brand or ''}" for title, brand in zip(titles, brands, strict=True)],
        "category_words": [category or "" for category in _categories(items)],
    }


def _categories(items: pa.Table) -> list[str | None]:
    """Each item's category, its whole path in words."""
    return [" > ".join(path) if path else None for path in items.column("category").to_pylist()]
