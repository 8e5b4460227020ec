"""What the API needs of the serving release: tasks, titles and the fallback. No model, and no torch.

The tables stay in Arrow's memory; an item is found by binary search, and those asked for of late are kept at hand.
"""

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.addresses import checked_copy, fetch
from components.config import ItemFilter
from components.exceptions import ReleaseError
from components.recall.serving.filters import blocked_items
from components.release.bundle import MANIFEST, read_manifest, read_tasks, verify_files
from components.release.publication import Publication
from components.schemas.item_keys import item_key
from components.settings import Settings

ITEMS_AT_HAND = 50_000  # some 20 MB
_NONE = np.empty(0, dtype=np.int64)
_FILES = (MANIFEST, "tasks.json", "titles.parquet", "fallback.parquet")


class ItemNote(NamedTuple):
    """What a release says of an item; of one that it does not know, nothing."""

    title: str | None
    category: list[str]  # not to be changed
    external_id: str | None


@dataclass(frozen=True)
class Catalogue:
    """Tables of one release.

    Attributes:
        release: Its name.
        tasks: Names of its tasks, in order.
        query_tasks: Names of those that need a query.
        fallback: Popular items by task: item ids and scores, best first.
        blocked: Items that a task may not recall, ascending, by its name.
    """

    release: str
    tasks: tuple[str, ...]
    query_tasks: tuple[str, ...]
    fallback: dict[str, tuple[list[int], list[float]]]
    blocked: Mapping[str, npt.NDArray[np.int64]]
    _item_ids: npt.NDArray[np.int64]
    _titles: pa.Table
    _by_external_id: npt.NDArray[np.uint64]  # rows of the titles
    _cached: Callable[[int], ItemNote] = field(init=False)

    def __post_init__(self) -> None:
        # The cache must not refer to this object: in a cycle it would outlive the release, for collections are rare.
        cached = lru_cache(ITEMS_AT_HAND)(partial(_describe, self._item_ids, self._titles))
        object.__setattr__(self, "_cached", cached)

    def find_blocked(self, task: str, item_ids: Sequence[int]) -> Sequence[int]:
        """Places of those of the items that a task may not recall; a task of another release blocks none."""
        blocked = self.blocked.get(task, _NONE)
        if not len(blocked):
            return ()
        asked = np.asarray(item_ids, dtype=np.int64)
        places = np.minimum(np.searchsorted(blocked, asked), len(blocked) - 1)
        found: list[int] = np.flatnonzero(blocked[places] == asked).tolist()
        return found

    def describe(self, item_id: int) -> ItemNote:
        """Title, category path and external id of an item."""
        return self._cached(item_id)

    def find(self, external_id: str) -> int:
        """The number of an item; of one that the release does not know, the number that ingest would give it."""
        order, external_ids = self._by_external_id, self._titles["external_id"]
        place = bisect_left(order, external_id, key=lambda row: external_ids[int(row)].as_py())
        if place < len(order) and external_ids[int(order[place])].as_py() == external_id:
            return int(self._item_ids[order[place]])
        return item_key(external_id)


def load_catalogue(
    publication: Publication, settings: Settings, filters: Mapping[str, ItemFilter] | None = None
) -> Catalogue:
    """Read the tables of a published release.

    Args:
        publication: Which.
        settings: Where.
        filters: What its fallback and stored results leave out beside unavailable items.

    Raises:
        ReleaseError: The bundle is not the one that was published, or a table is damaged.
        UrmError: The bundle cannot be reached.
    """
    settings.require_allowed(publication.bundle)
    bundle = fetch(publication.bundle, settings.cache_path / "bundles" / publication.manifest[:16], _FILES)
    with checked_copy(publication.bundle, bundle):
        manifest = read_manifest(bundle, publication.manifest)
        manifest.require(publication.release, publication.bundle)
        verify_files(bundle, manifest, _FILES[1:])
    tasks = read_tasks(bundle)
    titles = _read(bundle / "titles.parquet").sort_by("item_id").combine_chunks()
    popularity = _read(bundle / "fallback.parquet")
    fallback = {}
    blocked = blocked_items(titles, [task.name for task in tasks], filters or {})
    for task in tasks:
        of_task = pc.equal(popularity["task"], task.name)
        forbidden = pc.is_in(popularity["item_id"], pa.array(blocked[task.name]))
        rows = popularity.filter(pc.and_(of_task, pc.invert(forbidden)))
        fallback[task.name] = (rows["item_id"].to_pylist(), rows["score"].to_pylist())
    item_ids = np.asarray(titles["item_id"], dtype=np.int64)
    return Catalogue(
        release=manifest.release,
        tasks=tuple(task.name for task in tasks),
        query_tasks=tuple(task.name for task in tasks if task.needs_query),
        fallback=fallback,
        blocked=blocked,
        _item_ids=item_ids,
        _titles=titles,
        _by_external_id=np.asarray(pc.sort_indices(titles["external_id"]), dtype=np.uint64),
    )


def _describe(item_ids: npt.NDArray[np.int64], titles: pa.Table, item_id: int) -> ItemNote:
    row = int(np.searchsorted(item_ids, item_id))
    if row == len(item_ids) or item_ids[row] != item_id:
        return ItemNote(None, [], None)
    return ItemNote(*(titles[name][row].as_py() for name in ItemNote._fields))


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ReleaseError(
            f"bundle file {path}", expected="a Parquet file", got=error, remedy="build the release again"
        ) from None
