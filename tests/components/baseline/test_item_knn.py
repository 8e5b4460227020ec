"""Co-occurrence by hand, the window of the baskets, and the score as a plain sum."""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from components.baseline.data import Dataset
from components.baseline.item_knn import ItemKnn
from components.baseline.rules import history_weights
from components.config import SplitConfig
from components.items.cooccurrence import Baskets, count_pairs, read_baskets, shrunken_cosine
from components.schemas.events import EVENTS
from tests.worlds.baseline import history_of
from tests.worlds.tables import event_row, write


def test_similarity_by_hand(tmp_path: Path) -> None:
    baskets = sp.csr_array(np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=np.float32))
    pairs = count_pairs(Baskets(baskets, np.arange(3), 0), 1.0, tmp_path)
    similarity = shrunken_cosine(pairs, 1.0, tmp_path).toarray()
    expected = [
        [3 / (3 + 1), 2 / (np.sqrt(6) + 1), 1 / (np.sqrt(3) + 1)],
        [2 / (np.sqrt(6) + 1), 2 / (2 + 1), 1 / (np.sqrt(2) + 1)],
        [1 / (np.sqrt(3) + 1), 1 / (np.sqrt(2) + 1), 1 / (1 + 1)],
    ]
    assert similarity == pytest.approx(np.array(expected), rel=1e-6)


def test_baskets_hold_user_windows_before_validation_only(data: Dataset, world) -> None:
    split = world.config.features.split
    events = pq.read_table(world.folder / "events").to_pandas()
    events = events[(events["ts"] < split.validation_start) & events["item_id"].isin(set(data.items.ids))]
    window = np.floor((events["ts"] - pd.Timestamp(split.train_start)) / pd.Timedelta(split.window))
    expected = events.assign(window=window).groupby(["user_id", "window"])["item_id"].nunique()
    baskets = read_baskets(world.folder / "events", data.items.ids, split, split.validation_start).matrix
    assert sorted(np.diff(baskets.indptr)) == sorted(expected)
    assert set(baskets.data) == {1.0}


def test_score_is_the_weighted_sum_over_the_history(data: Dataset, world, tmp_path: Path) -> None:
    split = world.config.features.split
    baskets = read_baskets(world.folder / "events", data.items.ids, split, split.validation_start)
    similarity = shrunken_cosine(count_pairs(baskets, 1.0, tmp_path), 2.0, tmp_path)
    rows = data.examples.rows("test")[:5]
    scores = ItemKnn(data, similarity, half_life_days=60).score(rows).numpy()
    dense = similarity.toarray()
    for row, found in zip(rows, scores, strict=True):
        span = history_of(data, row)
        weights = history_weights(data.contexts.counts[span], data.contexts.days[span], 60)
        expected = weights @ dense[data.contexts.items[span]]
        assert found[expected > 0] == pytest.approx(expected[expected > 0], rel=1e-4)
        assert np.all(found[expected == 0] == -np.inf)


def test_in_leave_one_out_later_items_count_by_their_distance(tmp_path: Path) -> None:
    split = SplitConfig.model_validate({"kind": "leave_one_out"})
    days = [split.validation_start - timedelta(days=day) for day in (3, 2, 1)] + [split.validation_start]
    rows = [
        event_row(f"{user}{item}", item, day, user_id=user)
        for user, items in (("a", [10, 20, 30, 40]), ("b", [20, 30, 10, 10]))
        for item, day in zip(items, days, strict=True)
    ]  # fmt: skip
    events = tmp_path / "events"
    events.mkdir()
    write(events / "part.parquet", EVENTS, rows)
    baskets = read_baskets(events, np.array([10, 20, 30, 40]), split, split.validation_start)
    assert baskets.users.tolist() == [0, 0, 0, 1, 1, 1]
    # a: 10, 20, 30 and b: 20, 30, 10; 40 is a validation target
    assert count_pairs(baskets, 0.5, tmp_path).toarray() == pytest.approx(
        np.array([[2, 1 + 0.5 * 0.8, 0.8 + 0.5, 0], [0.8 + 0.5, 2, 2, 0], [1 + 0.5 * 0.8, 0.5 * 2, 2, 0], [0, 0, 0, 0]])
    )
    earlier = read_baskets(events, np.array([10, 20, 30, 40]), split, until=days[-2])
    assert count_pairs(earlier, 0.5, tmp_path).sum() == 2 + 2 * 1 + 2 * 1.5  # the first two events of each
