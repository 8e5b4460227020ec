"""Counts and baskets made in parts are those of everything at once, on random logs."""

import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import scipy.sparse as sp

from components.config import SplitConfig
from components.items import cooccurrence
from components.items.cooccurrence import GAP_DECAY, Baskets, count_pairs, read_baskets, shrunken_cosine
from components.schemas.events import EVENTS
from tests.worlds.tables import event_row, write

FIRST, WEEK = datetime(2025, 9, 1, tzinfo=UTC), timedelta(days=7)


def random_baskets(seed: int, reach: int) -> Baskets:
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(12, size=80))
    matrix = (rng.random((80, 30)) < 0.06).astype(np.float32)  # some items and some baskets have nothing
    return Baskets(sp.csr_array(matrix), users, reach)


def count_at_once(baskets: Baskets, backward: float) -> np.ndarray:
    """The formula, with whole matrices."""
    matrix = baskets.matrix.toarray()
    if not baskets.reach:
        return matrix.T @ matrix
    pairs = np.zeros((matrix.shape[1],) * 2, np.float32)
    for gap in range(1, baskets.reach + 1):
        earlier = np.flatnonzero(baskets.users[:-gap] == baskets.users[gap:])
        later = (matrix[earlier].T @ matrix[earlier + gap]) * np.float32(GAP_DECAY ** (gap - 1))
        pairs = pairs + later + np.float32(backward) * later.T
    np.fill_diagonal(pairs, matrix.sum(axis=0))
    return pairs


@pytest.mark.parametrize("at_once", [1, 40, 1 << 20])
@pytest.mark.parametrize("reach", [0, 3, 50])
@pytest.mark.parametrize("seed", range(3))
def test_counts_and_similarity_by_blocks_are_those_of_whole_matrices(
    seed: int, reach: int, at_once: int, tmp_path: Path
) -> None:
    baskets = random_baskets(seed, reach)
    pairs = count_pairs(baskets, 0.5, tmp_path, at_once)
    expected = count_at_once(baskets, 0.5)
    assert np.array_equal(pairs.toarray(), expected)
    assert pairs.nnz == np.count_nonzero(expected)
    roots = np.sqrt(np.diag(expected))
    similarity = shrunken_cosine(pairs, 2.0, tmp_path, at_once).toarray()
    assert np.array_equal(similarity, expected / (np.outer(roots, roots) + np.float32(2.0)))
    assert not list(tmp_path.iterdir())


def test_counts_of_no_baskets_are_none(tmp_path: Path) -> None:
    nothing = Baskets(sp.csr_array((0, 4), dtype=np.float32), np.empty(0, np.int64), 0)
    pairs = count_pairs(nothing, 1.0, tmp_path)
    assert pairs.shape == (4, 4)
    assert shrunken_cosine(pairs, 1.0, tmp_path).nnz == 0


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_baskets_of_a_log_in_files_are_its_distinct_users_windows_and_items(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooccurrence, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    split = SplitConfig(
        train_start=FIRST, validation_start=FIRST + 13 * WEEK, test_start=FIRST + 15 * WEEK, end=FIRST + 17 * WEEK
    )
    items = np.array([3, 5, 8, 13])
    rows, expected = [], set()
    for number in range(300):
        days = int(rng.integers(-400, 60))  # some before the first training cut, some after the end
        user, item = f"u{rng.integers(20)}", int(rng.choice([*items, 4, 99]))
        instant = split.validation_start + timedelta(days=days)
        rows.append(event_row(str(number), item, instant, user_id=user))
        if days < 0 and item in items:
            expected.add((user, (instant - split.train_start) // split.window, item))
    for part in range(3):
        write(tmp_path / f"part{part}.parquet", EVENTS, rows[part::3])
    baskets = read_baskets(tmp_path, items, split, split.validation_start)
    names = list(dict.fromkeys(row["user_id"] for part in range(3) for row in rows[part::3] if early(row, split)))
    by_basket: dict[tuple[int, int], list[int]] = {}
    for user, window, item in sorted((names.index(user), window, item) for user, window, item in expected):
        by_basket.setdefault((user, window), []).append(item)
    offsets = baskets.matrix.indptr
    found = [items[baskets.matrix.indices[a:b]].tolist() for a, b in itertools.pairwise(offsets)]
    assert found == list(by_basket.values())
    assert baskets.users.tolist() == [user for user, _ in by_basket]
    assert set(baskets.matrix.data) == {1.0}
    tokyo = ZoneInfo("Asia/Tokyo")
    dates = {name: getattr(split, name).astimezone(tokyo) for name in ("train_start", "validation_start", "test_start")}
    elsewhere = read_baskets(tmp_path, items, split.model_copy(update=dates), dates["validation_start"])
    assert (elsewhere.matrix != baskets.matrix).nnz == 0  # the same instants, written in another zone


def early(row: dict[str, object], split: SplitConfig) -> bool:
    return row["ts"] < split.validation_start
