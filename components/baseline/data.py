"""The stage's inputs as arrays in catalogue index space: items with features, contexts, examples.

An item's *index* is its row in the catalogue (sorted by item_id); history items outside the catalogue are dropped.
Ragged columns are flat values with offsets: row r is values[offsets[r]:offsets[r + 1]]. Columns of contexts and
examples are memory-mapped: of them, what a batch reads is in memory.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.config import Task
from components.exceptions import DataError
from components.items.table import POPULARITY, ItemTable
from components.items.words import split_words
from components.schemas.examples import BATCH_ROWS, map_array

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NUM_BUCKETS = 16  # quantile buckets of price and popularity; 0 stands for unknown
_STATISTICS = ("num_events", "num_items", "num_active_days", "days_since_last")
_HALF_PRECISION = 0.005  # item tables hold logarithms in 16 bits, and 2ᵏ - 1 baskets must not fall below k


@dataclass(frozen=True)
class Items:
    """Catalogue items and their categorical features."""

    ids: Ints  # item_id, ascending, shape [n]
    titles: tuple[str, ...]  # title of each, shape [n]
    categories: tuple[tuple[str, ...], ...]  # category path of each, top first, shape [n]; empty where it has none
    brands: tuple[str, ...]  # brand of each, shape [n]; "" where it has none
    train_events: Ints  # events in the training window, shape [n]
    popularity: Floats  # popularity quantile, 0 rarest … 1 most frequent, shape [n]
    log_counts: Floats  # log(1 + baskets), all and of several kinds (items/popularity.py), shape [n, G]
    features: Ints  # one code per feature, shape [n, F]; 0 stands for unknown
    names: tuple[str, ...]  # names of the F features

    def __len__(self) -> int:
        """Number of catalogue items."""
        return len(self.ids)


@dataclass(frozen=True)
class Contexts:
    """Users at their cuts."""

    users: Ints  # number of each context's user, shape [rows]; rows are sorted by cut
    items: Ints  # catalogue indices of the histories, newest first, flat
    counts: Floats  # events of each history item, flat
    days: Floats  # days from each item's last event to the cut, flat
    behaviors: Ints  # code of each item's last behaviour, flat; 0 stands for one unseen in training
    offsets: Ints  # row offsets of the four, shape [rows + 1]
    statistics: Floats  # log1p of events, items, active days and days since the last event, shape [rows, 4]
    num_behaviors: int  # number of behaviour codes, 0 included


@dataclass(frozen=True)
class Examples:
    """Tasks asked of contexts."""

    ids: Ints  # example_id, shape [rows]
    contexts: Ints  # row of each example's context, shape [rows]
    tasks: Ints  # index of the task in the run's configuration, shape [rows]
    splits: npt.NDArray[Any]  # train | validation | test, shape [rows]
    words: Ints  # codes of the query's words, flat, with `word_offsets`; words unseen in training are left out
    word_offsets: Ints
    targets: Ints  # catalogue indices of the targets, flat, with `target_offsets`
    target_offsets: Ints
    vocabulary: tuple[str, ...]  # words of the training queries, in code order
    query: Ints  # code of each example's query among `queries`, shape [rows]; -1 where it has none
    queries: tuple[str, ...]  # distinct queries, in code order

    def rows(self, split: str) -> Ints:
        """Rows of one split, those of one context side by side."""
        rows = np.flatnonzero(self.splits == split)
        return rows[np.argsort(self.contexts[rows], kind="stable")]


@dataclass(frozen=True)
class Dataset:
    """All a baseline sees."""

    items: Items
    contexts: Contexts
    examples: Examples
    tasks: tuple[Task, ...]

    @property
    def exclude_bought(self) -> npt.NDArray[np.bool_]:
        """Whether items the user had are no candidates of a task, shape [T]."""
        return np.array([task.exclude_bought for task in self.tasks])

    @property
    def prompts(self) -> Ints:
        """Number of each task's prompt template, shape [T]: tasks asked in the same words are one task to a model."""
        known = list(dict.fromkeys(task.prompt for task in self.tasks))
        return np.array([known.index(task.prompt) for task in self.tasks], dtype=np.int64)


def load_dataset(
    catalogue: Path,
    items: Path,
    item_table: Path,
    contexts: Path,
    examples: Path,
    tasks: tuple[Task, ...],
    folder: Path | None = None,
) -> Dataset:
    """Read the tables of the features stage, the items, and their interaction counts from the item table.

    Memory-mapped columns lie in `folder`, by default the system's for temporary files, and go with the process.

    Raises:
        DataError: A table names an item, a context or a task that is not there, or a split has no examples.
    """
    catalogue_items = _read_items(pq.read_table(catalogue), pq.read_table(items), ItemTable.open(item_table))
    return Dataset(
        items=catalogue_items,
        contexts=_read_contexts(contexts, catalogue_items.ids, folder),
        examples=_read_examples(examples, contexts, catalogue_items.ids, tasks, folder),
        tasks=tasks,
    )


def find(ids: Ints, wanted: Ints) -> Ints:
    """Positions of `wanted` in the ascending `ids`; -1 where absent."""
    positions = np.minimum(np.searchsorted(ids, wanted), len(ids) - 1)
    return np.where(ids[positions] == wanted, positions, -1)


def newest(contexts: Contexts, rows: Ints, num_items: int) -> tuple[Ints, Ints, Ints]:
    """The newest items of the histories of some contexts.

    Returns:
        Places of these items in the flat columns of `contexts`; for each the position within `rows` that it belongs to;
        and its rank in the history, 0 for the newest item.
    """
    flat, owner = places(contexts.offsets, rows)
    rank = flat - contexts.offsets[rows][owner]
    keep = rank < num_items
    return flat[keep], owner[keep], rank[keep]


def gather(values: npt.NDArray[Any], offsets: Ints, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
    """The given rows of a ragged column, concatenated.

    Returns:
        Their flat values, and for each value the position within `rows` that it belongs to.
    """
    flat, owner = places(offsets, rows)
    return values[flat], owner


def places(offsets: Ints, rows: Ints) -> tuple[Ints, Ints]:
    """Places of the given rows' values in a flat column, and for each the position within `rows` that it belongs to."""
    lengths = offsets[rows + 1] - offsets[rows]
    owner = np.repeat(np.arange(len(rows)), lengths)
    starts = np.repeat(offsets[rows] - np.cumsum(lengths) + lengths, lengths)
    return starts + np.arange(len(owner)), owner


def bucket(values: npt.NDArray[Any], num_buckets: int = NUM_BUCKETS) -> Ints:
    """Quantile buckets 1 … num_buckets; 0 where the value is missing."""
    known = np.isfinite(values)
    codes = np.zeros(len(values), dtype=np.int64)
    if known.any():
        edges = np.quantile(values[known], np.linspace(0, 1, num_buckets + 1)[1:-1])
        codes[known] = 1 + np.searchsorted(edges, values[known], side="right")
    return codes


def _read_items(catalogue: pa.Table, items: pa.Table, item_table: ItemTable) -> Items:
    ids = catalogue.column("item_id").to_numpy()
    item_ids = items.column("item_id").to_numpy()
    order = np.argsort(item_ids)
    rows = find(item_ids[order], ids)
    if (rows < 0).any():
        raise DataError(
            "catalogue",
            expected="items of the items table only",
            got=f"item {ids[rows < 0][0]} that it lacks",
            remedy="run `urm features` again on the same validated tables",
        )
    table = items.take(pa.array(order[rows]))
    paths = table.column("category").to_pylist()
    depth = max((len(path) for path in paths), default=0)
    price = table.column("price").to_numpy(zero_copy_only=False).astype(np.float64)
    popularity = catalogue.column("popularity_quantile").to_numpy().astype(np.float32)
    features = {f"category_{level}": _encode(_prefix(path, level) for path in paths) for level in range(depth)}
    features["brand"] = _encode(table.column("brand").to_pylist())
    features["price"] = bucket(price)
    features["popularity"] = bucket(popularity)
    # What URM knows of popularity beside the baskets (components/items/popularity.py), by powers of two as it has it.
    counts, _ = item_table.gather(POPULARITY, ids)
    for number, column in enumerate(counts.T[1:], start=1):
        features[f"popularity_{number}"] = 1 + np.floor(column / math.log(2) + _HALF_PRECISION).astype(np.int64)
    return Items(
        ids=ids,
        titles=tuple(table.column("title").to_pylist()),
        categories=tuple(tuple(path or ()) for path in paths),
        brands=tuple(brand or "" for brand in table.column("brand").to_pylist()),
        train_events=catalogue.column("train_events").to_numpy(),
        popularity=popularity,
        log_counts=counts.astype(np.float32),
        features=np.stack(list(features.values()), axis=1),
        names=tuple(features),
    )


def _prefix(path: Sequence[str], level: int) -> str | None:
    return " > ".join(path[: level + 1]) if len(path) > level else None


def _encode(values: Iterable[str | None]) -> Ints:
    values = list(values)
    known = sorted({value for value in values if value is not None})
    codes = {value: code for code, value in enumerate(known, start=1)}
    return np.array([0 if value is None else codes[value] for value in values], dtype=np.int64)


def _read_contexts(contexts: Path, ids: Ints, folder: Path | None) -> Contexts:
    def keep(batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        return find(ids, _flat(batch, "history_item_ids").astype(np.int64)) >= 0

    def kept(name: str, kind: npt.DTypeLike, encode: Callable[[pa.Array], npt.NDArray[Any]]) -> npt.NDArray[Any]:
        columns = dict.fromkeys(("history_item_ids", name))
        parts = (encode(batch.column(name).flatten())[keep(batch)] for batch in _batches(contexts, *columns))
        return map_array(parts, kind, folder)

    known = sorted(
        set().union(
            *(
                batch.filter(pc.equal(batch["split"], "train"))["history_behaviors"].flatten().unique().to_pylist()
                for batch in _batches(contexts, "split", "history_behaviors")
            )
        )
    )
    codes = pa.array(known, pa.string())
    table = pq.read_table(contexts, columns=["user_id", *_STATISTICS])
    statistics = [np.log1p(table.column(name).to_numpy().astype(np.float32)) for name in _STATISTICS]
    users = pc.dictionary_encode(table.column("user_id")).combine_chunks().indices.to_numpy()
    lengths = (
        np.diff(np.concatenate([[0], np.cumsum(keep(batch))])[_offsets(batch, "history_item_ids")])
        for batch in _batches(contexts, "history_item_ids")
    )
    return Contexts(
        users=map_array([users], np.int64, folder),
        items=kept("history_item_ids", np.int64, lambda values: find(ids, values.to_numpy())),
        counts=kept("history_counts", np.float32, pa.Array.to_numpy),
        days=kept("history_days_since", np.float32, pa.Array.to_numpy),
        behaviors=kept("history_behaviors", np.int64, lambda values: _code_of(values, codes) + 1),
        offsets=map_array(_running_sums(lengths), np.int64, folder),
        statistics=np.nan_to_num(np.stack(statistics, axis=1)),
        num_behaviors=len(known) + 1,
    )


def _read_examples(examples: Path, contexts: Path, ids: Ints, tasks: tuple[Task, ...], folder: Path | None) -> Examples:
    table = pq.read_table(examples, columns=["split", "task", "context_id", "query"])
    splits = table["split"].dictionary_encode().combine_chunks()
    missing = {"train", "validation", "test"} - set(splits.dictionary.to_pylist())
    if missing:
        raise DataError(
            "examples",
            expected="rows of the splits train, validation and test",
            got=f"none of {', '.join(sorted(missing))}",
            remedy="widen features.split or give a longer log",
        )
    found = (find(ids, _flat(batch, "target_item_ids")) for batch in _batches(examples, "target_item_ids"))
    targets = map_array(found, np.int64, folder)
    lengths = (np.diff(_offsets(batch, "target_item_ids")) for batch in _batches(examples, "target_item_ids"))
    rows = find(
        pq.read_table(contexts, columns=["context_id"])["context_id"].to_numpy(), table["context_id"].to_numpy()
    )
    task = _code_of(table["task"], pa.array([task.name for task in tasks]))
    if (targets < 0).any() or (rows < 0).any() or (task < 0).any():
        raise DataError(
            "examples",
            expected="targets in the catalogue, known contexts, and tasks of this run",
            got="a row that breaks this",
            remedy="run `urm features` again with this configuration",
        )
    queries = sorted(pc.unique(table["query"]).drop_null().to_pylist())
    query = _code_of(table["query"], pa.array(queries, pa.string()))
    split_names = np.array(splits.dictionary.to_pylist(), dtype=object)[splits.indices.to_numpy()]
    asked = np.unique(query[(split_names == "train") & (query >= 0)])
    vocabulary = sorted({word for code in asked.tolist() for word in split_words(queries[code])})
    codes = {word: code for code, word in enumerate(vocabulary)}
    known = [[codes[word] for word in split_words(text) if word in codes] for text in (*queries, "")]  # -1: no query
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in known])]).astype(np.int64)
    flat = np.array([code for row in known for code in row], dtype=np.int64)
    chunks = [query[start : start + BATCH_ROWS] % len(known) for start in range(0, len(query), BATCH_ROWS)]
    return Examples(
        ids=map_array((batch["example_id"].to_numpy() for batch in _batches(examples, "example_id")), np.int64, folder),
        contexts=map_array([rows], np.int64, folder),
        tasks=map_array([task], np.int64, folder),
        splits=split_names,
        words=map_array((gather(flat, offsets, chunk)[0] for chunk in chunks), np.int64, folder),
        word_offsets=map_array(_running_sums(np.diff(offsets)[chunk] for chunk in chunks), np.int64, folder),
        targets=targets,
        target_offsets=map_array(_running_sums(lengths), np.int64, folder),
        vocabulary=tuple(vocabulary),
        query=map_array([query], np.int64, folder),
        queries=tuple(queries),
    )


def _batches(parquet: Path, *columns: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(parquet) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=list(columns))


def _flat(batch: pa.RecordBatch, column: str) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = batch.column(column).flatten().to_numpy()
    return values


def _offsets(batch: pa.RecordBatch, column: str) -> Ints:
    return np.concatenate([[0], np.cumsum(pc.list_value_length(batch.column(column)).to_numpy())]).astype(np.int64)


def _running_sums(parts: Iterable[Ints]) -> Iterator[Ints]:
    """Offsets of rows of these lengths, which come in parts."""
    total = np.zeros(1, dtype=np.int64)
    yield total
    for lengths in parts:
        sums = total + np.cumsum(lengths)
        yield sums
        total = sums[-1:] if len(sums) else total


def _code_of(values: pa.Array | pa.ChunkedArray, known: pa.Array) -> Ints:
    """Places of values among the known ones; -1 where a value is not known."""
    codes: Ints = pc.fill_null(pc.index_in(values, value_set=known), -1).to_numpy().astype(np.int64)
    return codes
