"""Popularity: baskets of items, counted by hand for a tiny log."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.config import SplitConfig
from components.ingestion.schema import EVENTS
from components.items.popularity import Popularity, count_popularity

START = datetime(2017, 7, 3, 5, tzinfo=UTC)
SPLIT = SplitConfig(
    train_start=START,
    validation_start=START + timedelta(days=70),
    test_start=START + timedelta(days=77),
    end=START + timedelta(days=84),
    window_days=7,
    recent_cuts=2,
)
IDS = np.array([5, 7, 9, 11])
SHOWN, PLAIN = [("store_id", "true"), ("shown", "true")], [("store_id", "12"), ("shown", "false")]


def count(folder: Path, events: list[tuple[str, int, float, list[tuple[str, str]]]]) -> Popularity:
    """Of events (user, item, day, attributes)."""
    rows = [
        {"event_id": str(number), "user_id": user, "item_id": item, "behavior": "purchase", "scenario": "web",
         "query": None, "ts": START + timedelta(days=day), "attributes": attributes}
        for number, (user, item, day, attributes) in enumerate(events)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=EVENTS), folder / "part.parquet")
    return count_popularity(folder, IDS, SPLIT)


@pytest.fixture
def counted(tmp_path: Path) -> Popularity:
    """Training cuts of the last two weeks start on day 56; the training window ends on day 70."""
    return count(
        tmp_path,
        [
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
        ],
    )


def test_baskets_recent_ones_and_attributes_end_with_the_instant(counted: Popularity) -> None:
    np.testing.assert_allclose(np.expm1(counted.past[:, 0]), [4, 1, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.expm1(counted.now[:, 0]), [4, 3, 0, 0], atol=1e-5)
    np.testing.assert_allclose(np.expm1(counted.past[:, 1:]), [[1, 2], [0, 0], [0, 0], [0, 0]], atol=1e-5)
    np.testing.assert_allclose(np.expm1(counted.now[:, 1:]), [[0, 2], [2, 2], [0, 0], [0, 0]], atol=1e-5)


def test_only_attributes_that_say_yes_or_no_are_counted(counted: Popularity) -> None:
    assert counted.now.shape == (4, 3)  # `shown`, and not `store_id`, which once said 12


def test_events_without_attributes_give_two_counts(tmp_path: Path) -> None:
    assert count(tmp_path, [("a", 5, 1, []), ("b", 7, 2, [])]).now.shape == (4, 2)
