"""The stage's inputs as arrays in catalogue index space: items with features, contexts, examples.

An item's *index* is its row in the catalogue (sorted by item_id); history items outside the catalogue are dropped.
Ragged columns are flat values with offsets: row r is values[offsets[r]:offsets[r + 1]].
"""

import math
import re
from collections.abc import Iterable, Sequence
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
from components.schemas.examples import ragged

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]

NUM_BUCKETS = 16  # quantile buckets of price and popularity; 0 stands for unknown
_WORD = re.compile(r"[^\W_]+")
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
    catalogue: Path, items: Path, item_table: Path, contexts: Path, examples: Path, tasks: tuple[Task, ...]
) -> Dataset:
    """Read the tables of the features stage, the items, and their interaction counts from the item table.

    Raises:
        DataError: A table names an item, a context or a task that is not there, or a split has no examples.
    """
    catalogue_items = _read_items(pq.read_table(catalogue), pq.read_table(items), ItemTable.open(item_table))
    context_table, example_table = pq.read_table(contexts), pq.read_table(examples)
    return Dataset(
        items=catalogue_items,
        contexts=_read_contexts(context_table, catalogue_items.ids),
        examples=_read_examples(example_table, context_table, catalogue_items.ids, tasks),
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
    flat, owner = gather(np.arange(len(contexts.items)), contexts.offsets, rows)
    rank = flat - contexts.offsets[rows][owner]
    keep = rank < num_items
    return flat[keep], owner[keep], rank[keep]


def gather(values: npt.NDArray[Any], offsets: Ints, rows: Ints) -> tuple[npt.NDArray[Any], Ints]:
    """The given rows of a ragged column, concatenated.

    Returns:
        Their flat values, and for each value the position within `rows` that it belongs to.
    """
    lengths = offsets[rows + 1] - offsets[rows]
    owner = np.repeat(np.arange(len(rows)), lengths)
    starts = np.repeat(offsets[rows] - np.cumsum(lengths) + lengths, lengths)
    return values[starts + np.arange(len(owner))], owner


def bucket(values: npt.NDArray[Any], num_buckets: int = NUM_BUCKETS) -> Ints:
    """Quantile buckets 1 … num_buckets; 0 where the value is missing."""
    known = np.isfinite(values)
    codes = np.zeros(len(values), dtype=np.int64)
    if known.any():
        edges = np.quantile(values[known], np.linspace(0, 1, num_buckets + 1)[1:-1])
        codes[known] = 1 + np.searchsorted(edges, values[known], side="right")
    return codes


def split_words(text: str) -> list[str]:
    """Lower-case words of a query or of a field of an item; "_" separates, as in the names of some categories."""
    return _WORD.findall(text.lower())


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


def _read_contexts(table: pa.Table, ids: Ints) -> Contexts:
    items, offsets = ragged(table, "history_item_ids")
    behaviors, _ = ragged(table, "history_behaviors")
    in_training = np.repeat(table.column("split").to_numpy(zero_copy_only=False) == "train", np.diff(offsets))
    known = sorted(set(behaviors[in_training].tolist()))
    codes = {behavior: code for code, behavior in enumerate(known, start=1)}
    behavior_codes = np.array([codes.get(behavior, 0) for behavior in behaviors.tolist()], dtype=np.int64)
    indices = find(ids, items.astype(np.int64))
    keep = indices >= 0
    statistics = [
        np.log1p(table.column(name).to_numpy().astype(np.float32))
        for name in ("num_events", "num_items", "num_active_days", "days_since_last")
    ]
    return Contexts(
        users=pc.dictionary_encode(table.column("user_id").combine_chunks()).indices.to_numpy().astype(np.int64),
        items=indices[keep],
        counts=ragged(table, "history_counts")[0].astype(np.float32)[keep],
        days=ragged(table, "history_days_since")[0].astype(np.float32)[keep],
        behaviors=behavior_codes[keep],
        offsets=np.concatenate([[0], np.cumsum(keep)])[offsets],
        statistics=np.nan_to_num(np.stack(statistics, axis=1)),
        num_behaviors=len(known) + 1,
    )


def _read_examples(table: pa.Table, contexts: pa.Table, ids: Ints, tasks: tuple[Task, ...]) -> Examples:
    splits = table.column("split").to_numpy(zero_copy_only=False)
    missing = {"train", "validation", "test"} - set(splits.tolist())
    if missing:
        raise DataError(
            "examples",
            expected="rows of the splits train, validation and test",
            got=f"none of {', '.join(sorted(missing))}",
            remedy="widen features.split or give a longer log",
        )
    names = {task.name: index for index, task in enumerate(tasks)}
    targets, target_offsets = ragged(table, "target_item_ids")
    target_indices = find(ids, targets.astype(np.int64))
    rows = find(contexts.column("context_id").to_numpy(), table.column("context_id").to_numpy())
    task_names = table.column("task").to_pylist()
    if (target_indices < 0).any() or (rows < 0).any() or not names.keys() >= set(task_names):
        raise DataError(
            "examples",
            expected="targets in the catalogue, known contexts, and tasks of this run",
            got="a row that breaks this",
            remedy="run `urm features` again with this configuration",
        )
    texts = table.column("query").to_pylist()
    query_words = [split_words(text or "") for text in texts]
    in_training = [words for words, split in zip(query_words, splits, strict=True) if split == "train"]
    vocabulary = sorted({word for words in in_training for word in words})
    codes = {word: code for code, word in enumerate(vocabulary)}
    known = [[codes[word] for word in words if word in codes] for words in query_words]
    query = _encode(texts) - 1
    return Examples(
        ids=table.column("example_id").to_numpy(),
        contexts=rows,
        tasks=np.array([names[name] for name in task_names], dtype=np.int64),
        splits=splits,
        words=np.array([code for row in known for code in row], dtype=np.int64),
        word_offsets=np.concatenate([[0], np.cumsum([len(row) for row in known])]).astype(np.int64),
        targets=target_indices,
        target_offsets=target_offsets,
        vocabulary=tuple(vocabulary),
        query=query,
        queries=tuple(sorted({text for text in texts if text is not None})),
    )
