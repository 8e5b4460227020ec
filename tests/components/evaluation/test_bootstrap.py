"""The bootstrap's centre by hand, its coverage on simulated data, its p-values at the ends."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from components.evaluation.bootstrap import Comparison, compare, holm, relative_lift

K = 10


def make_hits(recalls: dict[str, np.ndarray], users: np.ndarray, tasks: np.ndarray) -> pd.DataFrame:
    """Rows whose recall is hits / 1000 for any share of thousandths."""
    examples = {"example_id": np.arange(len(users)), "user_id": users.astype(str), "task": tasks}
    examples |= {"k": 1000, "targets": 1000}
    frames = [
        pd.DataFrame(examples | {"model": model, "hits": np.round(values * 1000).astype(int)})
        for model, values in recalls.items()
    ]
    return pd.concat(frames)


def run(hits: pd.DataFrame, draws: int = 400) -> Comparison:
    return compare(hits, "urm", "target_attention", k=1000, draws=draws, seed=0)


def simulate(random: np.random.Generator, lift: float, num_users: int = 60) -> pd.DataFrame:
    """Users differ much, their examples little: treating examples as independent would be far too sure."""
    per_user = 4
    users = np.repeat(np.arange(num_users), per_user)
    level = random.uniform(0.2, 0.6, num_users)[users]
    effect = random.normal(lift, 0.2, num_users)[users]
    noise = random.normal(0, 0.02, (2, len(users)))
    recalls = {
        "target_attention": np.clip(level + noise[0], 0, 1),
        "urm": np.clip(level * (1 + effect) + noise[1], 0, 1),
    }
    return make_hits(recalls, users, np.full(len(users), "next"))


def test_lift_by_hand() -> None:
    users, tasks = np.array([0, 0, 1, 1]), np.array(["a", "b", "a", "b"])
    recalls = {"target_attention": np.array([0.2, 0.5, 0.4, 0.5]), "urm": np.array([0.3, 0.4, 0.6, 0.4])}
    comparison = run(make_hits(recalls, users, tasks))
    assert comparison.tasks == ("a", "b")
    assert comparison.examples.tolist() == [2, 2]
    assert comparison.lift == pytest.approx([0.5, -0.2])
    assert comparison.mean_lift == pytest.approx(0.15)
    low, high = comparison.interval(0.95)  # both users have the same lift: no draw can differ
    assert low == pytest.approx([0.5, -0.2])
    assert high == pytest.approx([0.5, -0.2])


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random, truth, trials = np.random.default_rng(11), 0.1, 120
    covered = 0
    for _ in range(trials):
        low, high = run(simulate(random, truth)).interval(0.90)
        covered += bool(low[0] <= truth <= high[0])
    # 90 % of the trials, within what a binomial allows but once in a thousand.
    assert stats.binom.ppf(0.0005, trials, 0.88) <= covered <= stats.binom.ppf(0.9995, trials, 0.92)


def test_matches_scipy_on_one_example_a_user() -> None:
    random = np.random.default_rng(5)
    base, model = random.uniform(0.1, 0.5, 300).round(3), random.uniform(0.1, 0.6, 300).round(3)
    hits = make_hits({"target_attention": base, "urm": model}, np.arange(300), np.full(300, "next"))
    low, high = run(hits, draws=4000).interval(0.95)
    options = {"paired": True, "n_resamples": 4000, "method": "percentile", "rng": np.random.default_rng(1)}
    lift = stats.bootstrap((base, model), lambda b, m, axis: m.mean(axis) / b.mean(axis) - 1, **options)
    expected = lift.confidence_interval
    assert low[0] == pytest.approx(expected.low, abs=0.015)
    assert high[0] == pytest.approx(expected.high, abs=0.015)


def test_p_values_tell_a_clear_difference_from_none() -> None:
    random = np.random.default_rng(7)
    assert run(simulate(random, 0.3)).p_different()[0] < 0.01
    assert run(simulate(random, 0.0)).p_different()[0] > 0.05
    loss = run(simulate(random, -0.3))
    assert loss.p_worse(0.1)[0] < 0.01
    assert loss.p_worse(0.6)[0] > 0.9


def test_a_task_without_baseline_hits_has_no_lift_and_stays_out_of_the_mean() -> None:
    users, tasks = np.repeat(np.arange(20), 2), np.tile(["a", "b"], 20)
    base = np.where(tasks == "a", 0.4, 0.0)
    comparison = run(make_hits({"target_attention": base, "urm": np.full(40, 0.5)}, users, tasks))
    assert np.isnan(comparison.lift[1])
    assert comparison.mean_lift == pytest.approx(0.25)
    assert comparison.mean_interval(0.95) == pytest.approx((0.25, 0.25))
    low, high = comparison.interval(0.95)
    assert np.isnan(low[1])
    assert np.isnan(high[1])


def test_equal_seeds_give_equal_draws() -> None:
    hits = simulate(np.random.default_rng(2), 0.1)
    assert np.array_equal(run(hits).model_draws, run(hits).model_draws)


def test_holm_by_hand() -> None:
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])


def test_relative_lift_over_zero_is_undefined() -> None:
    assert np.isnan(relative_lift(np.array([0.1]), np.array([0.0]))[0])
