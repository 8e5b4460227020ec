import faiss
import numpy as np
import pytest
import torch

from components.exceptions import DataError
from components.urm.retrieval.exhaustive import recall_of, top_of_all
from components.urm.retrieval.faiss_kinds import (
    EXACT_UP_TO,
    IVF_SQ8_UP_TO,
    build_approximate,
    choose_kind,
    count_cells,
    save_index,
)
from components.urm.retrieval.index import read_candidates, search
from components.urm.retrieval.users import UserVectors, combine_scores
from tests.worlds.vectors import without_own

NUM_ITEMS, WIDTH = 4000, 96
IDS = np.arange(NUM_ITEMS, dtype=np.int64) * 3 + 7
APPROXIMATE = ("ivf_sq8", "pq")
TOLERANCE = {"ivf_sq8": 0.01, "pq": 0.5}  # of a vector's places, kept in 16 and 4 bits


@pytest.fixture(scope="module")
def vectors():
    """Clusters of items of very different lengths: what inner products and cells get wrong together."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(40, WIDTH)) * 0.97 ** np.arange(WIDTH)
    items = centres[rng.integers(40, size=NUM_ITEMS)] + 0.3 * rng.normal(size=(NUM_ITEMS, WIDTH))
    return (items * rng.uniform(0.2, 2.0, size=(NUM_ITEMS, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def users(vectors):
    """Five requests of four vectors, each towards an item."""
    rng = np.random.default_rng(1)
    towards = vectors[rng.integers(NUM_ITEMS, size=(5, 4))]
    return (towards + 0.3 * rng.normal(size=towards.shape)).astype(np.float32)


@pytest.fixture(scope="module", params=APPROXIMATE)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def index(kind, vectors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("codes")
    built = build_approximate(kind, IDS, lambda: (vectors[:1500], vectors[1500:]), 0, folder)
    assert not any(folder.iterdir())
    return built


def test_kind_follows_the_size():
    sizes = (1, EXACT_UP_TO, EXACT_UP_TO + 1, IVF_SQ8_UP_TO, IVF_SQ8_UP_TO + 1)
    assert [choose_kind(n) for n in sizes] == ["exact", "exact", "ivf_sq8", "ivf_sq8", "pq"]


def test_cells_are_few_enough_to_be_trained():
    assert [count_cells(n) for n in (1, 100, 1_000_000, 10_000_000)] == [1, 2, 4096, 16384]


def test_approximate_answers_are_those_of_brute_force(index, kind, vectors, users):
    exact = top_of_all(IDS, [vectors], without_own(users), 20, "max")
    found, scores = search(index, without_own(users), 20, "max")
    assert recall_of(found, exact) >= {"ivf_sq8": 0.99, "pq": 0.8}[kind]
    places = [np.searchsorted(IDS, items) for items in found]
    for row, place, score in zip(users, places, scores, strict=True):
        assert score == pytest.approx((vectors[place] @ row.T).max(axis=1), rel=TOLERANCE[kind])
        assert (np.diff(score) <= 0).all()


@pytest.mark.parametrize("combine", ["mean", "logsumexp"])
def test_other_combinations_are_scored_with_all_vectors(index, vectors, users, combine):
    exact = top_of_all(IDS, [vectors], without_own(users), 20, combine)
    assert recall_of(search(index, without_own(users), NUM_ITEMS, combine)[0], exact) >= 0.95


def test_excluded_items_do_not_appear_and_leave_no_gap(index, users):
    plain, _ = search(index, without_own(users), 10, "max")
    found, _ = search(index, without_own(users), 10, "max", exclude=[items[:7] for items in plain])
    assert [len(items) for items in found] == [10] * 5
    assert not any(np.isin(items, old[:7]).any() for items, old in zip(found, plain, strict=True))


@pytest.fixture(params=["as a small catalogue", "in cells"])
def how_much_is_left(request, monkeypatch):
    """What is left is searched whole, or in the cells of the index."""
    if request.param == "in cells":
        monkeypatch.setattr("components.urm.retrieval.faiss_kinds.EXACT_UP_TO", 0)
    return request.param


@pytest.mark.parametrize("combine", ["max", "mean"])
@pytest.mark.parametrize("left", [0, 30, 400, 3000])
def test_what_is_blocked_does_not_appear_and_what_is_left_is_found(
    how_much_is_left, left, combine, index, kind, vectors, users
):
    """Far from the users, where the cells that a search begins with have little of it."""
    far = np.argsort((vectors @ users.reshape(-1, WIDTH).T).max(axis=1))[:left]
    keep = np.isin(np.arange(NUM_ITEMS), far)
    blocked = np.concatenate([IDS[~keep], [5]])  # no item has the number 5
    exact = top_of_all(IDS[keep], [vectors[keep]], without_own(users), 20, combine) if left else [IDS[:0]] * 5
    found, scores = search(index, without_own(users), 20, combine, blocked=blocked)
    assert [len(items) for items in found] == [min(20, left)] * 5
    assert not any(np.isin(items, blocked).any() for items in found)
    if how_much_is_left == "as a small catalogue" and kind == "ivf_sq8":
        assert recall_of(found, exact) >= 0.99
    elif left == 3000:
        assert recall_of(found, exact) >= {"ivf_sq8": 0.9, "pq": 0.5}[kind]
    assert all((np.diff(row) <= 0).all() for row in scores)


def test_what_is_blocked_does_not_appear_for_a_user_who_has_it(how_much_is_left, index, users):
    own = [IDS[:3]] + [IDS[:0]] * 4
    raised = [np.array([99, 99, 99], dtype=np.float32)] + [np.empty(0, dtype=np.float32)] * 4
    exclude = [IDS[2:3]] + [IDS[:0]] * 4
    found, _ = search(index, UserVectors(users, own, raised), 5, "max", exclude, blocked=IDS[:2])
    assert not np.isin(found[0], IDS[:3]).any() and [len(items) for items in found] == [5] * 5
    found, _ = search(index, UserVectors(users, own, raised), 5, "max", blocked=IDS[:2])
    assert found[0][0] == IDS[2]


def test_a_search_goes_no_deeper_for_what_is_blocked(how_much_is_left, index, users, monkeypatch):
    asked = []
    search_places = index._search_places
    monkeypatch.setattr(
        index,
        "_search_places",
        lambda queries, depth, *rest: asked.append(depth) or search_places(queries, depth, *rest),
    )
    search(index, without_own(users), 20, "max", blocked=IDS[:3000])
    assert max(asked, default=0) <= 350


@pytest.mark.parametrize("combine", ["max", "mean", "logsumexp"])
def test_copied_items_are_scored_wherever_they_lie(index, users, combine):
    without, _ = search(index, without_own(users), NUM_ITEMS, combine)
    worst = int(np.searchsorted(IDS, np.setdiff1d(IDS, without[0])[0]))  # behind every cell that is searched
    best = without[0][0]
    own = [np.array([IDS[worst], 5, best])] + [np.empty(0, dtype=np.int64)] * 4  # no item has the number 5
    raised = [np.array([0.5, 99, -0.25], dtype=np.float32)] + [np.empty(0, dtype=np.float32)] * 4
    found, scores = search(index, UserVectors(users, own, raised), NUM_ITEMS, combine)
    assert set(without[0]) | {IDS[worst]} == set(found[0])
    assert 5 not in found[0]
    products = torch.from_numpy(index.vectors_of(np.array([IDS[worst], best])) @ users[0].T)
    expected = combine_scores(products, combine).numpy() + np.array([0.5, -0.25], dtype=np.float32)
    got = [scores[0][found[0] == item].item() for item in (IDS[worst], best)]
    assert got == pytest.approx(expected.tolist(), rel=1e-5)


def test_k_beyond_the_catalogue_gives_what_the_searched_cells_hold(index, users):
    found, scores = search(index, without_own(users), 10 * NUM_ITEMS, "max")
    assert all(0 < len(items) < NUM_ITEMS for items in found)
    for items, row in zip(found, scores, strict=True):
        assert np.isin(items, IDS).all()
        assert len(set(items.tolist())) == len(items)
        assert np.isfinite(row).all()


def test_no_requests_give_no_results(index, users):
    assert search(index, without_own(users[:0]), 5, "max") == ([], [])


def test_vectors_and_known_items_come_by_id(index, kind, vectors):
    wanted = IDS[[3, 1999, NUM_ITEMS - 1]]
    assert index.vectors_of(wanted) == pytest.approx(vectors[[3, 1999, NUM_ITEMS - 1]], abs=TOLERANCE[kind])
    some, scores = np.array([IDS[-1] + 1, IDS[3], -4, 8, IDS[0]]), np.arange(5, dtype=np.float32)
    assert [part.tolist() for part in index._keep_known(some, scores)] == [[IDS[3], IDS[0]], [1, 4]]
    assert [part.tolist() for part in index._keep_known(some[:0], scores[:0])] == [[], []]


def test_index_file_answers_alike(index, users, tmp_path):
    save_index(index, tmp_path / "index.faiss")
    again = read_candidates(tmp_path / "index.faiss")
    for how in ("max", "mean"):
        for one, other in zip(
            search(index, without_own(users), 9, how), search(again, without_own(users), 9, how), strict=True
        ):
            assert [row.tolist() for row in one] == [row.tolist() for row in other]


def test_equal_input_gives_an_equal_file(kind, vectors, tmp_path):
    for name in ("a", "b"):
        built = build_approximate(kind, IDS[:1000], lambda: [vectors[:1000]], 3, tmp_path)
        save_index(built, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_handful_of_items_is_enough(kind, vectors, users, tmp_path):
    built = build_approximate(kind, IDS[:20], lambda: [vectors[:20]], 0, tmp_path)
    assert sorted(search(built, without_own(users), 20, "max")[0][0].tolist()) == IDS[:20].tolist()  # one cell


@pytest.mark.parametrize("ids", [IDS[:999], IDS[999::-1], np.zeros(1000, dtype=np.int64)])
def test_ids_that_do_not_fit_are_refused(ids, vectors, tmp_path):
    with pytest.raises(DataError, match="expected one vector per item and ascending item ids"):
        build_approximate("ivf_sq8", ids, lambda: [vectors[:1000]], 0, tmp_path)


def test_index_without_ids_is_refused(vectors, tmp_path):
    nameless = faiss.IndexFlatIP(WIDTH)
    nameless.add(vectors)
    faiss.write_index(nameless, str(tmp_path / "index.faiss"))
    with pytest.raises(DataError, match="expected an index that answers with item ids"):
        read_candidates(tmp_path / "index.faiss")
