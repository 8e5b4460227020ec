import numpy as np
import pytest

from benchmarks.catalogues import BLOCK, Catalogue
from components.items.ramps import num_ramps
from components.urm.network.heads import POPULARITY_RAMPS

SPACE, COUNTS = 20, 2
POPULARITY_AT = slice(SPACE, None)


@pytest.fixture
def catalogue():
    """Three hundred real items and more than a block of mixtures."""
    rng = np.random.default_rng(0)
    keys = np.arange(300) * 7 + 5
    space = rng.normal(size=(300, SPACE)) * 0.8 ** np.arange(SPACE) + 1
    popularity = rng.uniform(size=(300, num_ramps(COUNTS, POPULARITY_RAMPS)))
    vectors = np.concatenate([space, popularity], axis=1).astype(np.float32)
    return Catalogue(keys, vectors, popularity=num_ramps(COUNTS, POPULARITY_RAMPS), size=300 + BLOCK + 11)


def test_real_items_come_first_and_ids_ascend(catalogue):
    blocks = list(catalogue.blocks())
    assert [len(block) for block in blocks] == [300, BLOCK, 11]
    everything = np.concatenate(blocks)
    assert (everything[:300] == catalogue.vectors).all()
    assert (np.diff(catalogue.item_ids) > 0).all()


def test_mixtures_keep_mean_spread_and_popularity(catalogue):
    mixed = np.concatenate(list(catalogue.blocks())[1:])
    real = catalogue.vectors
    assert mixed[:, :SPACE].mean(axis=0) == pytest.approx(real[:, :SPACE].mean(axis=0), abs=0.05)
    assert mixed[:, :SPACE].std(axis=0) == pytest.approx(real[:, :SPACE].std(axis=0), rel=0.1)
    known = {row.tobytes() for row in real[:, POPULARITY_AT]}
    assert {row.tobytes() for row in mixed[:50, POPULARITY_AT]} <= known


def test_blocks_are_the_same_each_time(catalogue):
    for one, other in zip(catalogue.blocks(), catalogue.blocks(), strict=True):
        assert (one == other).all()
