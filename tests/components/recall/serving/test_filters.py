"""What serving leaves out: by brute force over small catalogues, and over a whole release with a real model."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from components.config import ItemFilter, RunConfig
from components.recall.serving.catalogue import load_catalogue
from components.recall.serving.context import build_context
from components.recall.serving.engine import load_release
from components.recall.serving.filters import blocked_items
from components.release.bundle import TITLES
from components.release.publication import Publication
from components.urm.data.request import RecallRequest
from tests.components.recall.serving.test_engine import remake
from tests.worlds.recall import Release
from tests.worlds.tiny import ITEM_IDS, make_config

NAMES = st.sampled_from(["a", "b", "c", "d"])
LISTS = st.lists(NAMES, max_size=2).map(tuple)
FILTERS = st.builds(ItemFilter, **{name: LISTS for name in ItemFilter.model_fields})
ITEMS = st.lists(
    st.fixed_dictionaries(
        {
            "item_id": st.integers(0, 99),
            "external_id": st.just("sku"),
            "title": st.just("t"),
            "category": st.lists(NAMES, max_size=3),
            "brand": st.none() | NAMES,
            "available": st.booleans(),
        }
    ),
    unique_by=lambda row: row["item_id"],
    max_size=12,
)


def passes(row: dict[str, Any], rule: ItemFilter) -> bool:
    levels, brand = set(row["category"]), row["brand"]
    return (
        (not rule.allow_categories or bool(levels & set(rule.allow_categories)))
        and not levels & set(rule.deny_categories)
        and (not rule.allow_brands or brand in rule.allow_brands)
        and brand not in rule.deny_brands
    )


@given(rows=ITEMS, every=FILTERS, own=FILTERS)
def test_an_item_passes_the_filters_of_all_tasks_and_of_its_own(
    rows: list[dict[str, Any]], every: ItemFilter, own: ItemFilter
) -> None:
    titles = pa.Table.from_pylist(rows, schema=TITLES)
    blocked = blocked_items(titles, ["t", "u"], {"all": every, "t": own})
    for task, rules in (("t", (every, own)), ("u", (every,))):
        wanted = [r["item_id"] for r in rows if not (r["available"] and all(passes(r, rule) for rule in rules))]
        assert blocked[task].tolist() == sorted(wanted)


def test_a_name_that_no_item_has_is_said() -> None:
    row = {
        "item_id": 1,
        "external_id": "1",
        "title": "t",
        "category": ["food", "beer"],
        "brand": "Acme",
        "available": True,
    }
    filters = {
        "all": ItemFilter(deny_brands=("Acme", "acme")),
        "t": ItemFilter(allow_categories=("beer", "Beer", "wine")),
    }
    with capture_logs() as logs:
        blocked_items(pa.Table.from_pylist([row], schema=TITLES), ["t"], filters)
    assert [(line["task"], line["field"], line["names"]) for line in logs] == [
        ("all", "deny_brands", ["acme"]),
        ("t", "allow_categories", ["Beer", "wine"]),
    ]


def test_filters_of_unknown_tasks_are_refused() -> None:
    content = make_config().model_dump()
    content["recall"]["filters"] = {"gift": {}}
    with pytest.raises(ValueError, match=r"expected filters of all or one of next_purchase, .* not of 'gift'"):
        RunConfig.model_validate(content)


def test_results_are_the_best_of_what_is_left_and_still_k(
    releases: tuple[Release, Release], broken_bundle: Path
) -> None:
    rows = [
        row | {"brand": f"brand {row['item_id'] % 5}", "available": row["item_id"] % 6 != 0}
        for row in pq.read_table(broken_bundle / "titles.parquet").to_pylist()
    ]
    (broken_bundle / "titles.parquet").unlink()
    pq.write_table(pa.Table.from_pylist(rows, schema=TITLES), broken_bundle / "titles.parquet")
    publication = Publication(release=remake(broken_bundle), bundle=str(broken_bundle), order=1)
    filters = {
        "all": ItemFilter(deny_brands=("brand 1",)),
        "next_purchase": ItemFilter(allow_categories=("shelf 2", "shelf 3")),
        "new_item": ItemFilter(deny_categories=("shelf 4",)),
    }
    release = load_release(publication, releases[1].settings, releases[1].config.release, filters)
    users = ["1", "7", "nobody"]
    known = release.read_histories(users)
    contexts = [build_context(known[user], [], release.rule) for user in users]
    requests = [
        RecallRequest(context, task, "shelf 3" if task.needs_query else None)
        for context in contexts
        for task in release.tasks
    ]
    vectors = release.recaller.encode_users(requests)
    everything, scores = release.recaller.top_k(vectors, len(ITEM_IDS))
    by_id = {row["item_id"]: row for row in rows}
    for k in (5, 40):
        rankings = release.recommend(requests, k)
        for request, (found, _), items, row in zip(requests, rankings, everything, scores, strict=True):
            rules = [filters["all"], filters.get(request.task.name, ItemFilter())]
            bought = set(request.context.item_ids.tolist()) if request.task.exclude_bought else set()
            left = [
                item
                for item in items[np.lexsort((items, -row))].tolist()
                if by_id[item]["available"] and item not in bought and all(passes(by_id[item], one) for one in rules)
            ]
            assert found == left[:k]
            assert len(found) == min(k, len(left))
    catalogue = load_catalogue(publication, releases[1].settings, filters)
    popular = pq.read_table(broken_bundle / "fallback.parquet").to_pylist()
    for task in release.tasks:
        rules = [filters["all"], filters.get(task.name, ItemFilter())]
        assert catalogue.fallback[task.name][0] == [
            row["item_id"]
            for row in popular
            if row["task"] == task.name
            and by_id[row["item_id"]]["available"]
            and all(passes(by_id[row["item_id"]], one) for one in rules)
        ]
