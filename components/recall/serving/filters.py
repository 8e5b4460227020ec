"""Items that serving leaves out: those the release knows as unavailable, and those a task's filters forbid.

Stored and ad-hoc results and the fallback are filtered alike. The offline evaluation is not: `available` is the state
of the day the bundle was built and says nothing of the weeks that are tested, and what a shop forbids (a recall, an age
limit, a campaign) is no property of the model; a target that is forbidden would lower every model alike.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import structlog

from components.config import EVERY_TASK, ItemFilter

log = structlog.get_logger()
Mask = npt.NDArray[np.bool_]


def blocked_items(
    titles: pa.Table, tasks: Iterable[str], filters: Mapping[str, ItemFilter]
) -> dict[str, npt.NDArray[np.int64]]:
    """Items that each task may not recall, ascending; tasks that block the same have one array.

    Args:
        titles: Of the bundle.
        tasks: Names.
        filters: By task name, or `all`.
    """
    item_ids = np.asarray(titles["item_id"], dtype=np.int64)
    free = np.array(titles["available"].to_numpy(), dtype=bool)
    if filters:
        _warn_of_unknown(titles, filters)
    if EVERY_TASK in filters:
        free &= _passing(titles, filters[EVERY_TASK])
    blocked: dict[str, npt.NDArray[np.int64]] = {}
    distinct: dict[bytes, npt.NDArray[np.int64]] = {}
    for task in tasks:
        passing = free & _passing(titles, filters[task]) if task in filters else free
        mine = np.sort(item_ids[~passing])
        blocked[task] = distinct.setdefault(mine.tobytes(), mine)
    return blocked


def _warn_of_unknown(titles: pa.Table, filters: Mapping[str, ItemFilter]) -> None:
    """Say which names no item has: misspelt, they forbid nothing, or allow nothing."""
    categories = set(pc.unique(pc.list_flatten(titles["category"])).to_pylist())
    brands = set(titles["brand"].unique().to_pylist())
    for task, rule in filters.items():
        for field, names in rule.model_dump().items():
            known = brands if field.endswith("brands") else categories
            if unknown := sorted(set(names) - known):
                log.warning("a filter names what no item of the release has", task=task, field=field, names=unknown)


def _passing(titles: pa.Table, rule: ItemFilter) -> Mask:
    passing = np.ones(titles.num_rows, dtype=bool)
    if rule.allow_categories:
        passing &= _in_categories(titles, rule.allow_categories)
    if rule.allow_brands:
        passing &= _of_brands(titles, rule.allow_brands)
    return passing & ~_in_categories(titles, rule.deny_categories) & ~_of_brands(titles, rule.deny_brands)


def _in_categories(titles: pa.Table, names: tuple[str, ...]) -> Mask:
    """Items with one of the names at any level of their category path."""
    found = np.zeros(titles.num_rows, dtype=bool)
    paths = titles["category"].combine_chunks()
    named = pc.is_in(pc.list_flatten(paths), pa.array(names, pa.string())).to_numpy(zero_copy_only=False)
    found[pc.list_parent_indices(paths).to_numpy()[named]] = True
    return found


def _of_brands(titles: pa.Table, names: tuple[str, ...]) -> Mask:
    return np.array(pc.is_in(titles["brand"], pa.array(names, pa.string())).to_numpy(), dtype=bool)
