"""ID vectors: inner products are similarities, and what comes later changes nothing."""

from datetime import datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from components.config import FeaturesConfig, SplitConfig
from components.ingestion.schema import EVENTS
from components.items.cooccurrence import Baskets, count_pairs, shrunken_cosine
from components.items.id_vectors import BACKWARD, SHRINKAGE, KnownItems, know_items, nearest, spectral_vectors
from components.items.spectral import ItemVectors, factorise, rotate

NUM_ITEMS, NUM_BASKETS = 30, 200


def make_baskets(seed: int, reach: int) -> Baskets:
    """Baskets within three groups of items; the last three items stand alone."""
    rng = np.random.default_rng(seed)
    matrix = np.zeros((NUM_BASKETS, NUM_ITEMS), dtype=np.float32)
    for row in matrix:
        row[rng.integers(3) * 9 + rng.choice(9, size=4, replace=False)] = 1
    users = np.repeat(np.arange(NUM_BASKETS // 4), 4)
    return Baskets(sp.csr_array(matrix), users, reach)


@pytest.mark.parametrize(("reach", "backward"), [(0, 1.0), (3, 0.5)])
def test_inner_products_are_the_similarity_up_to_one_factor(reach: int, backward: float) -> None:
    similarity = shrunken_cosine(count_pairs(make_baskets(0, reach), backward), 1.0)
    vectors = factorise(similarity, NUM_ITEMS, seed=0)
    plain = similarity.toarray() - np.diag(similarity.diagonal())
    products = vectors.history @ vectors.candidate.T
    factor = products.sum() / plain.sum()
    np.testing.assert_allclose(products, factor * plain, atol=2e-3)
    assert vectors.present.tolist() == [True] * 27 + [False] * 3
    np.testing.assert_array_equal(vectors.candidate[27:], 0)
    assert np.square(vectors.candidate[:27]).sum(axis=1).mean() == pytest.approx(1, rel=1e-4)


def test_a_rotation_brings_vectors_close_and_changes_no_inner_product() -> None:
    rng = np.random.default_rng(0)
    similarity = shrunken_cosine(count_pairs(make_baskets(0, 3), BACKWARD), SHRINKAGE)
    target = factorise(similarity, 12, seed=0)
    mirror = np.linalg.qr(rng.normal(size=(12, 12)))[0].astype(np.float32)
    turned = ItemVectors(target.candidate @ mirror, target.history @ mirror, target.present)
    back = rotate(turned, target)
    np.testing.assert_allclose(back.candidate, target.candidate, atol=1e-5)
    np.testing.assert_allclose(back.history @ back.candidate.T, turned.history @ turned.candidate.T, atol=1e-5)


def test_what_happens_at_or_after_the_instant_changes_nothing(tmp_path: Path) -> None:
    split = SplitConfig.model_validate({"kind": "leave_one_out", "recent_cuts": 2})
    features = FeaturesConfig.model_validate({"split": split.model_dump(exclude_none=True), "min_item_events": 0})
    rng = np.random.default_rng(0)
    ids = np.arange(10, 20)

    def write(name: str, changed: set[int]) -> Path:
        rows = [
            {"event_id": f"{user}-{place}", "user_id": str(user), "behavior": "purchase", "scenario": "web",
             "item_id": int(ids[rng.integers(5)] if place in changed else ids[(user * 7 + place * 3) % 10]),
             "query": None, "ts": split.end - timedelta(days=8 - place, hours=-1), "attributes": []}
            for user in range(12) for place in range(8)
        ]  # fmt: skip
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=EVENTS), tmp_path / name / "part.parquet")
        return tmp_path / name

    def know(events: Path, until: datetime) -> KnownItems:
        return know_items(events, ids, features, until=until, dimension=6, seed=0)

    plain, later_changed = write("plain", set()), write("later", {4, 5, 6, 7})  # the last four: recent, held out
    first, second = know(plain, split.recent_start), know(later_changed, split.recent_start)
    np.testing.assert_array_equal(first.vectors.candidate, second.vectors.candidate)
    np.testing.assert_array_equal(first.log_count, second.log_count)
    assert np.expm1(first.log_count).sum() == pytest.approx(12 * 4)
    now = know(plain, split.validation_start)
    assert np.expm1(now.log_count).sum() == pytest.approx(12 * 6)
    assert not np.allclose(now.log_count, know(later_changed, split.validation_start).log_count)


def test_a_rare_item_has_no_vector(tmp_path: Path) -> None:
    baskets = make_baskets(0, 0)
    vectors = spectral_vectors(baskets, 8, seed=0)
    assert vectors.present.tolist() == [True] * 27 + [False] * 3
    assert vectors.candidate.shape == (NUM_ITEMS, 8)


def test_the_nearest_of_each_row_are_kept_and_the_diagonal() -> None:
    similarity = sp.csr_array(np.array([[0, 3, 1, 2], [1, 9, 0, 2], [0, 0, 0, 0], [4, 3, 2, 1.0]]))
    assert nearest(similarity, 2).toarray().tolist() == [[1, 1, 0, 1], [0, 1, 0, 1], [0, 0, 1, 0], [1, 1, 0, 1]]
