"""The ID model: what it is asked, and that it learns order, company and content."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from components.items.cooccurrence import Baskets
from components.items.id_network import FollowBatch, IdNetwork, ItemContent, follow_examples, train_id_network
from components.items.id_vectors import ItemVectors, read_vectors

NUM_ITEMS = 40


def sequences(rows: list[list[int]], num_items: int = NUM_ITEMS) -> Baskets:
    """One item a basket."""
    users = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    items = np.concatenate([np.asarray(row) for row in rows])
    matrix = sp.csr_array((np.ones(len(items), np.float32), (np.arange(len(items)), items)), (len(items), num_items))
    return Baskets(matrix, users, 50)


def train(
    baskets: Baskets, content: ItemContent, dimension: int, *, steps: int = 150, min_count: float = 0, seed: int = 0
) -> ItemVectors:
    counts = np.asarray(baskets.matrix.sum(axis=0), dtype=np.float32)
    network = IdNetwork(content, counts >= max(1, min_count), dimension, seed)
    network.set_counts(counts, min_count)
    limits = {"epochs": 1000, "max_steps": steps, "final_rate": 0.02}
    train_id_network(network, follow_examples(baskets), **limits, seed=seed, report=lambda *_: None)
    return read_vectors(network)


def read_all(baskets: Baskets) -> FollowBatch:
    examples = follow_examples(baskets)
    return examples.read(np.arange(len(examples)))


def no_content(num_items: int = NUM_ITEMS) -> ItemContent:
    return ItemContent(np.zeros((num_items, 4), np.float32), np.zeros((num_items, 2), np.int64))


def cycles(num_users: int = 300, length: int = 8) -> list[list[int]]:
    """Everybody walks up through the items, from any of them."""
    starts = np.random.default_rng(0).integers(NUM_ITEMS, size=num_users)
    return [[int(start + step) % NUM_ITEMS for step in range(length)] for start in starts]


def test_every_item_but_those_of_the_first_basket_is_asked_for_with_what_came_before() -> None:
    matrix = np.zeros((4, 6), np.float32)
    matrix[0, [0, 1]], matrix[1, 2], matrix[2, [3, 4]], matrix[3, 5] = 1, 1, 1, 1
    examples = read_all(Baskets(sp.csr_array(matrix), np.array([0, 0, 0, 1]), 0))
    assert list(zip(examples.owners.tolist(), examples.targets.tolist(), strict=True)) == [(1, 2), (2, 3), (2, 4)]
    assert examples.history[0, :3].tolist() == [1, 0, 6]
    assert examples.ages[0, :3].tolist() == [1, 1, 0]
    assert examples.history[1, :4].tolist() == [2, 1, 0, 6]
    assert examples.ages[1, :4].tolist() == [1, 2, 2, 0]


@pytest.mark.parametrize("seed", range(5))
def test_examples_read_in_parts_equal_those_of_all_baskets_at_once(seed: int) -> None:
    rng = np.random.default_rng(seed)
    users = np.sort(rng.integers(4, size=60))  # more baskets and items per user than a history is long
    matrix = (rng.random((60, 9)) < 0.3).astype(np.float32)
    matrix[np.arange(60), rng.integers(9, size=60)] = 1
    expected = []
    for basket, user in enumerate(users):
        earlier = [
            (item, basket - other)
            for other in range(basket - 1, -1, -1)
            if users[other] == user
            for item in np.flatnonzero(matrix[other])[::-1].tolist()
        ][:20]
        padded = earlier + [(9, 0)] * (20 - len(earlier))
        expected += [(basket, item, padded) for item in np.flatnonzero(matrix[basket]).tolist() if earlier]
    examples = follow_examples(Baskets(sp.csr_array(matrix), users, 0))
    order = rng.permutation(len(examples))
    read = [examples.read(part) for part in np.array_split(order, 7)]
    found = [
        (owner, target, list(zip(items, ages, strict=True)))
        for batch in read
        for items, ages, owner, target in zip(*(values.tolist() for values in batch), strict=True)
    ]
    assert found == [expected[place] for place in order]


def test_the_loss_is_the_sampled_softmax_of_its_formula() -> None:
    counts = np.arange(NUM_ITEMS, dtype=np.float32)
    network = IdNetwork(no_content(), counts >= 1, 8, 0).eval()
    network.set_counts(counts, 0)
    history, ages = torch.tensor([[3, 5, NUM_ITEMS]]), torch.tensor([[1, 2, 0]])
    negatives, log_expected = torch.tensor([7, 9, 9]), torch.tensor([0.3, -0.2, -0.2])
    target, hits = torch.tensor([9]), torch.tensor([[False, True, True]])
    with torch.no_grad():
        loss = network.loss(history, ages, target, negatives, log_expected, hits)
        h, x = (network.vectors(role, torch.arange(NUM_ITEMS)) for role in (0, 1))
    weights = torch.tensor([1.0, 0.5]) / 1.5
    user = weights[0] * h[3] + weights[1] * h[5]
    scores = 8.0 * x @ user + 0.5 * torch.log1p(torch.from_numpy(counts))
    expected = torch.logaddexp(scores[9], scores[7] - 0.3) - scores[9]
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_it_learns_what_follows_what_and_in_which_order() -> None:
    vectors = train(sequences(cycles()), no_content(), 16)
    products = vectors.history @ vectors.candidate.T
    np.fill_diagonal(products, -np.inf)
    following = (np.arange(NUM_ITEMS) + 1) % NUM_ITEMS
    assert (products.argmax(axis=1) == following).mean() > 0.9
    assert (products[np.arange(NUM_ITEMS), following] > products[following, np.arange(NUM_ITEMS)]).all()
    assert np.square(vectors.candidate).sum(axis=1).mean() == pytest.approx(1, rel=1e-4)


def test_an_item_that_nobody_had_is_placed_by_its_content() -> None:
    rng = np.random.default_rng(0)
    kind = np.arange(NUM_ITEMS) % 2  # users stay within a kind, which the text tells; the last four are never had
    rows = [(2 * rng.integers(18, size=6) + user % 2).tolist() for user in range(300)]
    text = np.eye(2, dtype=np.float32)[kind] + rng.normal(0, 0.1, (NUM_ITEMS, 2)).astype(np.float32)
    content = ItemContent(text, np.zeros((NUM_ITEMS, 2), np.int64))
    vectors = train(sequences(rows), content, 8)
    products = vectors.history[:36] @ vectors.candidate[36:].T
    same = kind[:36, None] == kind[None, 36:]
    assert products[same].mean() > products[~same].mean() + 0.2
    assert vectors.present.all()


def test_training_again_gives_the_same_vectors_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = train(sequences(cycles(50)), no_content(), 8, steps=2).candidate
    assert torch.equal(torch.rand(1), expected)
    again = train(sequences(cycles(50)), no_content(), 8, steps=2).candidate
    np.testing.assert_allclose(first, again, atol=1e-5)  # sums of several threads come in any order
    assert not np.allclose(first, train(sequences(cycles(50)), no_content(), 8, steps=2, seed=1).candidate)


def test_a_log_without_a_second_basket_gives_vectors_of_content_alone() -> None:
    baskets = sequences([[0], [1], [1]], 3)
    attributes = np.array([[0, 0], [1, 0], [1, 0]])
    vectors = train(baskets, ItemContent(np.zeros((3, 2), np.float32), attributes), 4, min_count=2)
    assert vectors.present.tolist() == [False, True, True]
    assert not vectors.candidate[0].any()
    assert np.isfinite(vectors.candidate).all()
