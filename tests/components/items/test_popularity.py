"""Popularity: baskets of items, counted by hand for a tiny log."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from components.config import SplitConfig
from components.engines.duckdb import open_engine
from components.items import popularity
from components.items.popularity import Popularity, count_popularity
from components.schemas.events import EVENTS
from components.settings import Settings
from tests.worlds.tables import event_row, write

START = datetime(2017, 7, 3, 5, tzinfo=UTC)
STARTS = {"validation_start": 70, "test_start": 77, "end": 84}
BOUNDS = {name: START + timedelta(days=day) for name, day in STARTS.items()}
SPLIT = SplitConfig(train_start=START, **BOUNDS, window_days=7, recent_cuts=2)
ITEMS = pa.table({"item_id": [5, 7, 9, 11], "category": [["food", "ice"], ["food", "bread"], ["food"], []]})
SHOWN, PLAIN = [("store_id", "true"), ("shown", "true")], [("store_id", "12"), ("shown", "false")]


def count(folder: Path, events: list[tuple[str, int, float, list[tuple[str, str]]]]) -> Popularity:
    """Of events (user, item, day, attributes)."""
    rows = [
        event_row(number, item, START + timedelta(days=day), user_id=user, attributes=attributes)
        for number, (user, item, day, attributes) in enumerate(events)
    ]
    write(folder / "part.parquet", EVENTS, rows)
    with open_engine(folder / "spill", Settings(num_threads=1)) as engine:
        return count_popularity(engine, folder, ITEMS, SPLIT)


@pytest.fixture
def counted(tmp_path: Path) -> Popularity:
    """Training cuts of the last two weeks start on day 56; the training window ends on day 70."""
    events = [
        ("a", 5, 1, PLAIN),
        ("a", 5, 2, SHOWN),  # the same week and user: the same basket
        ("b", 5, 1, PLAIN),
        ("a", 5, -10, PLAIN),  # before the first cut is training, too
        ("a", 5, 50, SHOWN),
        ("a", 7, 41.9, PLAIN),  # the last day that is not recent at day 56
        ("a", 7, 57, SHOWN),
        ("b", 7, 57, SHOWN),
        ("a", 9, 71, SHOWN),  # after the training window
        ("a", 3, 1, PLAIN),  # none of the items asked for
    ]
    return count(tmp_path, events)


def test_baskets_recent_ones_and_attributes_end_with_the_instant(counted: Popularity) -> None:
    np.testing.assert_allclose(np.expm1(counted.past[:, 0]), [4, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.expm1(counted.now[:, 0]), [4, 3, 0, 0], atol=1e-5)
    recent_and_shown = [1, -1]
    np.testing.assert_allclose(np.expm1(counted.past[:, recent_and_shown]), [[1, 2], [0, 0], [0, 0], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(np.expm1(counted.now[:, recent_and_shown]), [[0, 2], [2, 2], [0, 0], [0, 0]], atol=1e-5)


def test_what_opens_a_category_for_a_user_is_counted_by_level(tmp_path: Path) -> None:
    """Openings of the newest two windows, from day 56 on at the end of the training window."""
    events = [
        ("a", 11, 1, []),  # no category, but the user has begun
        ("a", 5, 60, []),  # opens food and ice,
        ("a", 7, 61, []),  # in the same window food again, and bread
        ("a", 9, 65, []),  # food is known by now
        ("b", 5, 57, []),  # all is new to a user who begins
        ("b", 7, 64, []),  # opens bread, not food
        ("c", 11, 1, []),
        ("c", 7, 50, []),  # opened too long ago for day 70, not for day 56
        ("c", 7, 60, []),
    ]
    counted = count(tmp_path, events)
    opened = [2, 3, 4]
    np.testing.assert_allclose(np.expm1(counted.now[:, opened]), [[1, 1, 0], [1, 2, 0], [0] * 3, [0] * 3], atol=1e-5)
    np.testing.assert_allclose(np.expm1(counted.past[:, opened]), [[0] * 3, [1, 1, 0], [0] * 3, [0] * 3], atol=1e-5)


def test_only_attributes_that_say_yes_or_no_are_counted(counted: Popularity) -> None:
    assert counted.now.shape == (4, 6)  # `shown`, and not `store_id`, which once said 12


def test_events_without_attributes_give_counts_of_baskets_recent_ones_and_openings(tmp_path: Path) -> None:
    assert count(tmp_path, [("a", 5, 1, []), ("b", 7, 2, [])]).now.shape == (4, 5)


def test_many_shares_of_users_count_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(3)
    events = [
        (f"user {random.integers(40)}", int(random.choice([5, 7, 9])), float(random.uniform(0, 75)), attributes)
        for attributes in 150 * [SHOWN, PLAIN]
    ]
    at_once = count(tmp_path / "one", events)
    monkeypatch.setattr(popularity, "memory_limit", lambda engine: 5_000)
    in_shares = count(tmp_path / "many", events)
    for one, many in zip(at_once, in_shares, strict=True):
        assert one.sum() > 10
        np.testing.assert_array_equal(one, many)
