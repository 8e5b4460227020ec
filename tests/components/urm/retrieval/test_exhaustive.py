import numpy as np
import pytest

from components.urm.retrieval.exhaustive import recall_of, top_of_all
from components.urm.retrieval.users import UserVectors
from tests.worlds.vectors import without_own

IDS = np.arange(100, 160)


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    return rng.normal(size=(len(IDS), 6)).astype(np.float32), rng.normal(size=(4, 3, 6)).astype(np.float32)


def scores_of(vectors, users, combine):
    products = np.einsum("ehd,nd->enh", users.astype(np.float64), vectors)
    how = {"max": products.max(-1), "mean": products.mean(-1), "logsumexp": np.log(np.exp(products).mean(-1))}
    return how[combine]


@pytest.mark.parametrize("combine", ["max", "mean", "logsumexp"])
@pytest.mark.parametrize("block", [7, 60])
def test_blocks_give_the_best_of_the_whole(world, combine, block):
    vectors, users = world
    blocks = (vectors[start : start + block] for start in range(0, len(IDS), block))
    found = top_of_all(IDS, blocks, without_own(users), 10, combine)
    expected = IDS[np.argsort(-scores_of(vectors, users, combine), axis=1)[:, :10]]
    assert [row.tolist() for row in found] == expected.tolist()


def test_excluded_items_are_left_out_and_few_items_give_few(world):
    vectors, users = world
    exclude = [IDS[:50], IDS[:0], IDS[10:20], IDS]
    found = top_of_all(IDS, [vectors[:30], vectors[30:]], without_own(users), 55, "max", exclude)
    assert [len(row) for row in found] == [10, 55, 50, 0]
    assert not set(found[2]) & set(IDS[10:20])


def test_copy_scores_are_added_wherever_the_items_lie(world):
    vectors, users = world
    own = [IDS[[55, 2]], IDS[:0], np.array([7]), IDS[:1]]  # no item has the number 7
    raised = [np.array([90, 80]), np.array([]), np.array([70]), np.array([-60])]
    asked = UserVectors(users, own, [scores.astype(np.float32) for scores in raised])
    found = top_of_all(IDS, [vectors[:30], vectors[30:]], asked, 60, "max")
    plain = top_of_all(IDS, [vectors], without_own(users), 60, "max")
    assert found[0][:2].tolist() == [155, 102]
    assert found[0][2:].tolist() == [item for item in plain[0] if item not in (155, 102)]
    assert [row.tolist() for row in found[1:3]] == [row.tolist() for row in plain[1:3]]
    assert found[3][-1] == IDS[0]


def test_recall_is_the_mean_share_found():
    exact = [np.array([1, 2]), np.array([3, 4, 5, 6]), np.array([], dtype=np.int64)]
    assert recall_of([np.array([2, 9]), np.array([6, 5, 4, 3]), np.array([7])], exact) == pytest.approx(2.5 / 3)
