import math

import numpy as np
import pytest
import torch

from components.urm.retrieval.users import combine_scores
from components.urm.training.loss import sampled_nce, text_loss


def loss_of(users, targets, negatives, *, combine="max", **given):
    """The loss; unless given, every target counts, a negative is expected once and no hit, copy scores are zero."""
    users, targets, negatives = map(torch.as_tensor, (users, targets, negatives))
    pairs = len(users), len(negatives)
    values = {
        "mask": torch.ones(targets.shape[:2], dtype=torch.bool),
        "log_expected": torch.zeros(len(negatives)),
        "accidental": torch.zeros(pairs, dtype=torch.bool),
        "copies": torch.zeros(targets.shape[:2]),
        "negative_copies": torch.zeros(pairs),
    } | {name: torch.as_tensor(value) for name, value in given.items()}
    scores = values["accidental"], values["copies"], values["negative_copies"]
    return sampled_nce(users, targets, values["mask"], negatives, values["log_expected"], *scores, combine)


@pytest.mark.parametrize("expected_count", [1, 4])
def test_one_target_one_negative_is_the_softmax_of_two_the_negative_divided_by_how_often_it_is_expected(expected_count):
    # s(target) = 2, s(negative) = 1, expected count n: the loss is -log(e² / (e² + e / n)).
    log_expected = [math.log(expected_count)]
    loss = float(loss_of([[[1.0, 0.0]]], [[[2.0, 5.0]]], [[1.0, -3.0]], log_expected=log_expected))
    assert loss == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + math.exp(1) / expected_count)), abs=1e-6)


def test_sampled_softmax_with_every_item_drawn_once_is_the_full_softmax():
    torch.manual_seed(0)
    users, items = torch.randn(1, 1, 4), torch.randn(6, 4)
    own = [[True, False, False, False, False, False]]  # the target itself is accidental
    loss = loss_of(users, items[None, :1], items, accidental=own)
    logits = (items @ users[0, 0])[None]
    assert float(loss) == pytest.approx(float(torch.nn.functional.cross_entropy(logits, torch.tensor([0]))), abs=1e-5)


def test_copy_scores_are_added_to_the_products():
    # s(target) = 2 + 0.5, s(negatives) = 1 - 0.25 and 3.
    copies = {"copies": [[0.5]], "negative_copies": [[-0.25, 0.0]]}
    loss = loss_of([[[1.0, 0.0]]], [[[2.0, 5.0]]], [[1.0, -3.0], [3.0, 0.0]], **copies)
    expected = -math.log(math.exp(2.5) / (math.exp(2.5) + math.exp(0.75) + math.exp(3)))
    assert float(loss) == pytest.approx(expected, abs=1e-6)


def test_accidental_hits_do_not_count():
    with_hit = loss_of([[[1.0]]], [[[2.0]]], [[1.0], [9.0]], accidental=[[False, True]])
    assert float(with_hit) == pytest.approx(float(loss_of([[[1.0]]], [[[2.0]]], [[1.0]])))


def test_each_target_pulls_its_best_vector_under_max():
    users = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    loss = loss_of(users, [[[3.0, 0.0]]], [[0.0, -1.0]])  # the target is nearest to the first vector
    loss.backward()
    assert users.grad[0, 0].abs().sum() > 0.01
    assert users.grad[0, 1].abs().sum() == 0  # worse on the target and on the negative: neither moves it


def test_padding_of_targets_has_no_weight_and_examples_count_alike():
    one, other = (float(loss_of([[[1.0]]], [[[score]]], [[0.0]])) for score in (2.0, 1.0))
    targets, mask = [[[2.0], [2.0]], [[1.0], [7.0]]], [[True, True], [True, False]]
    both = float(loss_of([[[1.0]], [[1.0]]], targets, [[0.0]], mask=mask))
    assert both == pytest.approx((one + other) / 2)


@pytest.mark.parametrize(
    ("how", "expected"), [("max", 3.0), ("mean", 2.0), ("logsumexp", math.log((math.e + math.e**3) / 2))]
)
def test_combine(how, expected):
    assert float(combine_scores(torch.tensor([1.0, 3.0]), how)) == pytest.approx(expected, abs=1e-6)
    assert float(combine_scores(torch.tensor([2.0, 2.0, 2.0]), how)) == pytest.approx(2.0, abs=1e-6)


def test_text_loss_is_the_mean_over_tokens_and_zero_without_text():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    assert float(text_loss(logits, torch.tensor([1, 0]))) == pytest.approx((math.log(2) - math.log(3 / 4)) / 2)
    assert float(text_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))) == 0.0


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_several_targets_pull_one_vector_each():
    # Scores under max: 3 by the first vector, 2 by the second; the negative -1 by the first. By hand:
    # d loss / d s(t) = -σ(s(n) - s(t)) / 2 for either target, d loss / d s(n) = minus the sum of the two.
    users = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    loss_of(users, [[[3.0, 0.0], [0.0, 2.0]]], [[-1.0, -2.0]]).backward()
    first, second = sigmoid(-1 - 3) / 2, sigmoid(-1 - 2) / 2
    expected = [[-first * 3 - (first + second), -2 * (first + second)], [0.0, -second * 2]]
    torch.testing.assert_close(users.grad[0], torch.tensor(expected))


@pytest.mark.parametrize("how", ["mean", "logsumexp"])
def test_under_the_other_combinations_a_target_pulls_every_vector(how):
    users = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    scores = {
        "mean": (1.5, -1.5),
        "logsumexp": (math.log((math.exp(3) + 1) / 2), math.log((math.e**-1 + math.e**-2) / 2)),
    }
    target, negative = scores[how]
    loss = loss_of(users, [[[3.0, 0.0]]], [[-1.0, -2.0]], combine=how)
    assert float(loss.detach()) == pytest.approx(math.log1p(math.exp(negative - target)), abs=1e-6)
    loss.backward()
    assert (users.grad[0].abs().sum(dim=-1) > 1e-3).all()


def test_the_corrected_sum_over_frequent_draws_estimates_the_sum_over_all_items():
    """Negatives drawn by frequency are divided by how often they come: Σ exp(s - log Nq) is an unbiased Σ exp(s)."""
    rng = np.random.default_rng(0)
    num_items, num_draws = 50, 100_000
    frequency = np.arange(1, num_items + 1) ** -1.0
    share = frequency / frequency.sum()
    scores = rng.normal(size=num_items)
    drawn = rng.choice(num_items, size=num_draws, p=share)

    def estimate(log_expected):
        # A target of score 0: the loss is log(1 + Σ), which gives the sum back.
        loss = loss_of([[[1.0]]], [[[0.0]]], scores[drawn][:, None].tolist(), log_expected=log_expected)
        return math.expm1(float(loss))

    assert estimate(np.log(num_draws * share)[drawn].tolist()) == pytest.approx(np.exp(scores).sum(), rel=0.02)
    uncorrected = estimate([math.log(num_draws / num_items)] * num_draws)
    assert uncorrected != pytest.approx(np.exp(scores).sum(), rel=0.02)


def test_a_hit_is_accidental_for_its_own_example_only():
    # The same two negatives; the second is a target of the first example.
    first = float(loss_of([[[1.0]]], [[[2.0]]], [[1.0]]))
    second = float(loss_of([[[1.0]]], [[[2.0]]], [[1.0], [2.0]]))
    accidental = [[False, True], [False, False]]
    both = float(loss_of([[[1.0]], [[1.0]]], [[[2.0]], [[2.0]]], [[1.0], [2.0]], accidental=accidental))
    assert both == pytest.approx((first + second) / 2)


def test_an_example_whose_every_negative_is_a_target_teaches_nothing():
    users = torch.tensor([[[1.0]], [[1.0]]], requires_grad=True)
    loss = loss_of(users, [[[2.0]], [[2.0]]], [[1.0]], accidental=[[True], [False]])
    loss.backward()
    assert users.grad[0] == 0
    assert float(users.grad[1]) == pytest.approx(sigmoid(1 - 2) * (1 - 2) / 2)


def test_text_gradient_is_probability_minus_truth_over_the_tokens():
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], requires_grad=True)
    text_loss(logits, torch.tensor([1, 0])).backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.25, -0.25], [-0.125, 0.125]]))
    silent = torch.zeros(0, 2, requires_grad=True)
    text_loss(silent, torch.zeros(0, dtype=torch.long)).backward()
    assert silent.grad.shape == (0, 2)
