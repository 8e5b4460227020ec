import numpy as np
import pytest
import torch

from components.exceptions import DataError, MissingInputError
from components.urm.retrieval import exact
from components.urm.retrieval.exact import ExactIndex
from components.urm.retrieval.faiss_kinds import save_index
from components.urm.retrieval.index import read_candidates, search
from components.urm.retrieval.users import UserVectors, combine_scores
from tests.worlds.mapped import mapped_file
from tests.worlds.vectors import without_own

IDS = np.arange(500, 700)


@pytest.fixture
def world():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(IDS), 8)).astype(np.float32)
    users = rng.normal(size=(5, 4, 8)).astype(np.float32)
    return vectors, users


def brute_force(vectors, users, k, combine, exclude=None, raised=0):
    """The readable oracle: every item's H products, combined, raised by [n, N], sorted."""
    products = np.einsum("ehd,nd->enh", users, vectors)
    top = products.max(axis=-1, keepdims=True)
    score = {
        "max": lambda: products.max(axis=-1),
        "mean": lambda: products.mean(axis=-1),
        "logsumexp": lambda: top[..., 0] + np.log(np.exp(products - top).mean(axis=-1)),
    }[combine]() + raised
    result = []
    for row, scores in enumerate(score):
        order = [i for i in np.argsort(-scores) if exclude is None or IDS[i] not in exclude[row]]
        result.append(IDS[order[:k]])
    return result


def test_max_is_exact(world):
    vectors, users = world
    found, scores = search(ExactIndex(IDS, vectors), without_own(users), 20, "max")
    for items, expected, score in zip(found, brute_force(vectors, users, 20, "max"), scores, strict=True):
        assert items.tolist() == expected.tolist()
        assert (np.diff(score) <= 0).all()


@pytest.mark.parametrize("combine", ["mean", "logsumexp"])
def test_other_combinations_are_exact_once_the_union_is_the_catalogue(world, combine):
    vectors, users = world
    found, _ = search(ExactIndex(IDS, vectors), without_own(users), len(IDS), combine)
    expected = brute_force(vectors, users, len(IDS), combine)
    assert [items.tolist() for items in found] == [items.tolist() for items in expected]


def test_excluded_items_do_not_appear_and_leave_no_gap(world):
    vectors, users = world
    plain, _ = search(ExactIndex(IDS, vectors), without_own(users), 10, "max")
    exclude = [items[:7] for items in plain]
    found, _ = search(ExactIndex(IDS, vectors), without_own(users), 10, "max", exclude)
    expected = brute_force(vectors, users, 10, "max", exclude)
    assert [items.tolist() for items in found] == [items.tolist() for items in expected]


@pytest.mark.parametrize("combine", ["max", "mean", "logsumexp"])
@pytest.mark.parametrize("coarse", [False, True])
def test_blocks_and_a_first_pass_in_bfloat16_change_nothing(world, monkeypatch, combine, coarse):
    monkeypatch.setattr(exact, "BLOCK", 64)  # 200 items: three whole blocks and one of eight
    monkeypatch.setattr(exact, "SPARE", 30)
    monkeypatch.setattr(exact, "COARSE_FROM", 1)
    monkeypatch.setattr(exact, "has_bfloat16", lambda _: coarse)
    vectors, users = world
    exclude = [IDS[row::7] for row in range(len(users))]
    rng = np.random.default_rng(2)
    raised = np.where(rng.random((len(users), len(IDS))) < 0.1, rng.normal(0, 3, (len(users), len(IDS))), 0)
    raised = raised.astype(np.float32)
    own = [np.append(IDS[row != 0], 12) for row in raised]  # no item has the number 12
    copy_scores = [np.append(row[row != 0], 99).astype(np.float32) for row in raised]
    shuffled = np.random.default_rng(1).permutation(len(IDS))
    index = ExactIndex(IDS[shuffled], vectors[shuffled])
    found, scores = search(index, UserVectors(users, own, copy_scores), 20, combine, exclude)
    expected = brute_force(vectors, users, 20, combine, exclude, raised)
    assert [items.tolist() for items in found] == [items.tolist() for items in expected]
    for row, items in enumerate(found):
        products = vectors[items - IDS[0]] @ users[row].T
        precise = combine_scores(torch.from_numpy(products), combine).numpy() + raised[row, items - IDS[0]]
        np.testing.assert_allclose(scores[row], precise, atol=1e-5)


def test_a_vector_that_is_not_a_number_is_never_found(world):
    vectors, users = world
    vectors[::2] = np.nan
    found, scores = search(ExactIndex(IDS, vectors), without_own(users), len(IDS), "max")
    assert all(sorted(items.tolist()) == IDS[1::2].tolist() for items in found)
    assert all(np.isfinite(score).all() for score in scores)


def test_vectors_stay_in_the_index_file(world, tmp_path):
    vectors, _ = world
    file = tmp_path / "index.faiss"
    save_index(ExactIndex(IDS, vectors), file)
    index = read_candidates(file)
    assert index.item_ids.tolist() == IDS.tolist()
    np.testing.assert_array_equal(index.vectors, vectors)
    np.testing.assert_array_equal(index.vectors_of(IDS[[7, 3]]), vectors[[7, 3]])
    assert mapped_file(index.vectors.ctypes.data) == str(file)


def test_equal_scores_come_by_item_id():
    vectors = np.ones((4, 2), dtype=np.float32)
    found, _ = search(
        ExactIndex(np.array([9, 3, 7, 5]), vectors), without_own(np.ones((1, 2, 2), dtype=np.float32)), 4, "max"
    )
    assert found[0].tolist() == [3, 5, 7, 9]


def test_k_beyond_the_catalogue_gives_the_catalogue(world):
    vectors, users = world
    found, _ = search(ExactIndex(IDS, vectors), without_own(users), 10_000, "max")
    assert sorted(found[0].tolist()) == IDS.tolist()


def test_no_requests_give_no_results(world):
    assert search(ExactIndex(IDS, world[0]), without_own(world[1][:0]), 5, "max") == ([], [])


def test_vectors_of_another_model_are_refused(world):
    with pytest.raises(DataError, match="user vectors of width 8"):
        search(ExactIndex(IDS, world[0]), without_own(world[1][..., :3]), 5, "max")


def test_folder_and_index_file_answer_alike(world, tmp_path):
    vectors, users = world
    np.save(tmp_path / "keys.npy", IDS)
    np.save(tmp_path / "vectors.npy", vectors)
    save_index(ExactIndex(IDS, vectors), tmp_path / "index.faiss")
    folder, file = read_candidates(tmp_path), read_candidates(tmp_path / "index.faiss")
    for how in ("max", "mean"):
        assert [a.tolist() for a in search(folder, without_own(users), 9, how)[0]] == [
            a.tolist() for a in search(file, without_own(users), 9, how)[0]
        ]


def test_missing_candidates_name_the_file(tmp_path):
    with pytest.raises(MissingInputError, match=r"no keys\.npy"):
        read_candidates(tmp_path)
