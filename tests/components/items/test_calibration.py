import dataclasses

import numpy as np
import pytest
import torch

from components.items.calibration import PRIOR, Calibration, Shortlists, calibrate, fit_slopes, spread_slopes
from components.items.ramps import DOUBLINGS, ramp_features

EXAMPLES, ITEMS, K = 1000, 40, 5
MISSING = np.linspace(-1.2, 0.2, DOUBLINGS)  # what the scores lack, for each doubling of a count


def lists(missing, *, contexts=None, seed=0):
    """Shortlists of scores that lack a function of the count; the targets follow the whole."""
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(EXAMPLES, ITEMS)).astype(np.float32)
    counts = np.log1p(np.exp(rng.uniform(0, 6, (EXAMPLES, ITEMS))).astype(int)).astype(np.float32)
    truth = scores + added(counts, missing)
    chosen = (truth + rng.gumbel(size=truth.shape)).argmax(axis=1)
    wanted = np.zeros(scores.shape, dtype=bool)
    wanted[np.arange(EXAMPLES), chosen] = True
    owners = np.arange(EXAMPLES) if contexts is None else contexts
    return Shortlists(owners, scores, counts, wanted, np.ones(EXAMPLES, dtype=np.int64))


def added(counts, slopes):
    features = ramp_features(torch.from_numpy(counts).reshape(-1, 1), 1)
    return (features @ torch.as_tensor(slopes, dtype=torch.float32)).numpy().reshape(counts.shape)


def test_finds_what_the_scores_lack_and_recalls_more():
    found = calibrate(lists(MISSING), K)
    assert found.taken
    assert found.recall > found.before + 0.1
    counts = np.log1p(np.arange(1, 400, dtype=np.float32))  # what items have here
    difference = added(counts, found.slopes) - added(counts, MISSING)
    assert np.ptp(difference) < 1  # a constant changes no order
    assert np.ptp(added(counts, MISSING)) > 4


def test_no_slopes_explain_the_targets_better():
    given = lists(MISSING)
    everyone = np.ones(EXAMPLES, dtype=bool)
    slopes = fit_slopes(given, everyone).requires_grad_()
    features = ramp_features(torch.from_numpy(given.log_counts).reshape(-1, 1), 1).view(EXAMPLES, ITEMS, -1)
    likelihood = torch.log_softmax(torch.from_numpy(given.scores) + features @ slopes, dim=1)
    loss = -likelihood[torch.from_numpy(given.wanted)].mean() + PRIOR * slopes.square().sum()
    loss.backward()
    assert slopes.grad.abs().max() < 1e-3


def test_a_task_keeps_what_it_has_where_others_do_not_gain():
    one, other = lists(MISSING), lists(-MISSING, seed=1)  # each half would mislead the other
    parts = {
        name: np.concatenate([getattr(one, name), getattr(other, name)])
        for name in ("scores", "log_counts", "wanted", "num_targets")
    }
    contexts = np.concatenate([np.arange(EXAMPLES) * 2, np.arange(EXAMPLES) * 2 + 1])
    found = calibrate(Shortlists(contexts, **parts), K)
    assert not found.taken
    assert found.recall == found.before
    assert not found.slopes.any()


def test_examples_of_one_context_judge_together():
    contexts = np.repeat(np.arange(EXAMPLES // 2), 2)
    found = calibrate(lists(MISSING, contexts=contexts), K)
    assert found.taken
    alone = calibrate(lists(MISSING, contexts=np.zeros(EXAMPLES)), K)  # no other context chooses
    assert (alone.taken, alone.recall) == (False, alone.before)


def test_items_that_are_not_there_are_never_found_and_targets_beyond_the_list_count_as_missed():
    given = lists(MISSING)
    scores, wanted = given.scores.copy(), given.wanted.copy()
    scores[:, 30:] = -np.inf
    wanted[:, 30:] = False
    targets = np.full(EXAMPLES, 2)
    found = calibrate(Shortlists(given.contexts, scores, given.log_counts, wanted, targets), K)
    assert found.slopes.isfinite().all()
    whole = calibrate(Shortlists(given.contexts, scores[:, :30], given.log_counts[:, :30], wanted[:, :30], targets), K)
    torch.testing.assert_close(found.slopes, whole.slopes, atol=1e-3, rtol=0)
    assert found.recall <= wanted.any(axis=1).mean() / 2


def test_what_id_vectors_alone_say_is_weighed_by_what_it_adds():
    given, rng = lists(np.zeros(DOUBLINGS)), np.random.default_rng(3)
    said = rng.normal(size=given.scores.shape).astype(np.float32)
    told = dataclasses.replace(given, scores=given.scores - 0.8 * said, id_scores=said)  # scores that lack it
    found = calibrate(told, K)
    assert found.id_weight == pytest.approx(0.8, abs=0.21)  # one step of the weights
    assert found.recall > found.before + 0.05
    assert calibrate(dataclasses.replace(told, id_scores=None), K).id_weight == 0
    unrelated = calibrate(dataclasses.replace(given, id_scores=said), K)
    assert unrelated.id_weight == 0


def test_a_weight_that_puts_fewer_targets_in_front_is_not_taken():
    """What brings the best to the first place and others from behind it out of the k."""
    scores = np.tile(np.array([5, 4, 3, 2, 1, 0], dtype=np.float32), (200, 1))
    wanted = np.tile(np.array([False, True, True, False, False, False]), (200, 1))
    said = np.tile(np.array([0, 40, -40, 1, 1, 1], dtype=np.float32), (200, 1))
    given = Shortlists(np.arange(200), scores, np.zeros_like(scores), wanted, np.full(200, 2), said)
    assert calibrate(given, 3).id_weight == 0
    assert calibrate(dataclasses.replace(given, id_scores=said.clip(min=0)), 3).id_weight > 0


@pytest.mark.parametrize("num", [1, 2])
def test_without_targets_nothing_changes(num):
    empty = np.zeros((num, 3), dtype=np.float32)
    found = calibrate(Shortlists(np.arange(num), empty, empty, empty > 0, np.ones(num, dtype=np.int64)), K)
    assert isinstance(found, Calibration)
    assert (found.taken, found.recall) == (False, 0.0)
    assert not found.slopes.any()


def test_finer_ramps_make_the_same_function():
    slopes = torch.from_numpy(MISSING).float()
    weights = spread_slopes({1: slopes}, 3, 2, 4)
    log_counts = torch.from_numpy(np.log1p(np.random.default_rng(0).integers(0, 3000, (50, 2))).astype(np.float32))
    scores = ramp_features(log_counts, 4) @ weights.T
    wanted = ramp_features(log_counts[:, :1], 1) @ slopes
    torch.testing.assert_close(scores[:, 1], wanted)
    assert not scores[:, [0, 2]].any()


def test_tasks_that_share_a_prompt_are_judged_together_and_told_apart():
    found = calibrate(lists(MISSING), K)
    first = np.arange(EXAMPLES) < 300
    parts = [found.part(rows) for rows in (first, ~first)]
    assert all(part.taken and part.slopes is found.slopes for part in parts)
    assert [part.recall for part in parts] == [found.calibrated[:300].mean(), found.calibrated[300:].mean()]
    assert 0.3 * parts[0].recall + 0.7 * parts[1].recall == pytest.approx(found.recall)
