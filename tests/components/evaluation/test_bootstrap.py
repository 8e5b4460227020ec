"""The bootstrap's centre by hand, its coverage on simulated data, its p-values at the ends."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from components.evaluation.bootstrap import Comparison, compare, holm, mean_interval, relative_lift

K = 10


def make_hits(
    recalls: dict[str, np.ndarray], users: np.ndarray, tasks: np.ndarray, queries: np.ndarray | None = None
) -> pd.DataFrame:
    """Rows whose recall is hits / 1000 for any share of thousandths."""
    examples = {"example_id": np.arange(len(users)), "user_id": users.astype(str), "task": tasks}
    examples |= {"k": 1000, "targets": 1000, "held_out_query": queries}
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
    users, tasks = np.repeat(np.arange(6), 2), np.tile(["a", "b"], 6)  # of two kinds
    recalls = {"target_attention": np.array([0.2, 0.5, 0.4, 0.5]), "urm": np.array([0.3, 0.4, 0.6, 0.4])}
    comparison = run(make_hits({model: np.tile(values, 3) for model, values in recalls.items()}, users, tasks))
    assert comparison.tasks == ("a", "b")
    assert comparison.examples.tolist() == [6, 6]
    assert comparison.lift == pytest.approx([0.5, -0.2])
    assert comparison.mean_lift == pytest.approx(0.15)
    low, high = comparison.interval(0.95)  # all users have the same lift: no draw can differ
    assert low == pytest.approx([0.5, -0.2])
    assert high == pytest.approx([0.5, -0.2])


def test_chance_of_training_widens_the_interval_and_one_training_has_none() -> None:
    comparison = run(simulate(np.random.default_rng(3), 0.1), draws=2000)
    low, high = comparison.ratio_interval(0.95)
    same = comparison.training_interval([0.1] * 3, 0.95)  # no chance but that of the users
    assert same == pytest.approx((low, high), abs=0.1 * (high - low))
    apart = comparison.training_interval([0.0, 0.1, 0.2], 0.95)  # ± .0577 · t of two to three degrees of freedom
    assert 0.6 > apart[1] - apart[0] > 2 * (high - low)
    assert sum(apart) / 2 == pytest.approx(comparison.ratio)
    assert np.isnan(comparison.training_interval([0.1], 0.95)).all()
    assert np.isnan(run(simulate(np.random.default_rng(3), 0.1, num_users=5)).training_interval([0.1, 0.2], 0.95)).all()


def test_the_interval_of_three_trainings_covers_the_truth_where_that_of_the_users_does_not() -> None:
    random, truth, trials = np.random.default_rng(4), 0.05, 1000
    comparison = run(simulate(random, truth))
    lifts = relative_lift(comparison.model_draws, comparison.baseline_draws)
    of_users = float(np.std(lifts))
    covered = np.zeros(2)
    for _ in range(trials):  # trainings differ among themselves twice as much as chance among users moves them all
        ratios = truth + random.normal(0, of_users) + random.normal(0, 2 * of_users, 3)
        found = replace(comparison, model=comparison.baseline * (1 + ratios.mean()))
        low, high = found.training_interval(ratios.tolist(), 0.95)
        covered += [abs(found.ratio - truth) < 1.96 * of_users, low < truth < high]
    of_users_alone, with_trainings = covered / trials
    assert of_users_alone < 0.85
    assert 0.93 < with_trainings < 0.995


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


def test_ratio_of_means_by_hand() -> None:
    users, tasks = np.repeat(np.arange(6), 2), np.tile(["a", "b"], 6)  # of two kinds
    recalls = {"target_attention": np.array([0.1, 0.5, 0.3, 0.7]), "urm": np.array([0.2, 0.5, 0.4, 0.5])}
    comparison = run(make_hits({model: np.tile(values, 3) for model, values in recalls.items()}, users, tasks))
    assert comparison.ratio == pytest.approx((0.3 + 0.5) / (0.2 + 0.6) - 1)
    assert comparison.mean_lift == pytest.approx((0.5 - 1 / 6) / 2)  # the task of small recalls decides
    # Draws of one kind alone, of the other alone, of both.
    low, high = comparison.ratio_interval(0.999)
    assert (low, high) == (pytest.approx(0.9 / 1.0 - 1), pytest.approx(0.7 / 0.6 - 1))


@pytest.mark.parametrize(("num_users", "least"), [(1, 1.0), (3, 0.25), (5, 0.0625), (6, 0.03125), (40, 0.0)])
def test_users_who_agree_prove_no_more_than_their_number_allows(num_users: int, least: float) -> None:
    users = np.repeat(np.arange(num_users), 2)
    better = {"target_attention": np.full(2 * num_users, 0.2), "urm": np.full(2 * num_users, 0.3)}
    comparison = run(make_hits(better, users, np.full(len(users), "next")))
    assert comparison.p_different()[0] == pytest.approx(max(least, 2 / 401))
    worse = run(make_hits(better | {"urm": np.full(2 * num_users, 0.1)}, users, np.full(len(users), "next")))
    assert worse.p_worse(0.1)[0] == pytest.approx(max(least / 2, 1 / 401))
    few = num_users < 6
    assert comparison.few_users is few
    intervals = (comparison.interval(0.95)[0][0], comparison.ratio_interval(0.95)[0], comparison.mean_interval(0.95)[0])
    assert [np.isnan(low) for low in (*intervals, comparison.difference_interval(0.95)[0])] == [few] * 4


def test_a_few_held_out_categories_prove_as_little() -> None:
    categories = 3
    users = np.repeat(np.arange(60), 2)
    queries = np.array([f"c{number % categories}" for number in range(len(users))])
    recalls = {"target_attention": np.full(len(users), 0.2), "urm": np.full(len(users), 0.3)}
    comparison = run(make_hits(recalls, users, np.full(len(users), "next"), queries))
    assert comparison.units.tolist() == [categories]
    assert comparison.p_different()[0] == pytest.approx(2 * 0.5**categories)
    assert np.isnan(comparison.interval(0.95)[0][0])


def test_some_tasks_keep_their_draws_and_correct_for_fewer() -> None:
    random = np.random.default_rng(3)
    users, tasks = np.repeat(np.arange(80), 3), np.tile(["a", "b", "c"], 80)
    base = random.uniform(0.2, 0.5, 240)
    comparison = run(make_hits({"target_attention": base, "urm": base + random.normal(0.01, 0.1, 240)}, users, tasks))
    some = comparison.restrict(["c", "a"])
    assert some.tasks == ("a", "c")
    assert np.array_equal(some.model_draws, comparison.model_draws[:, [0, 2]])
    assert some.ratio == pytest.approx(comparison.model[[0, 2]].mean() / comparison.baseline[[0, 2]].mean() - 1)
    assert (some.p_different() <= comparison.p_different()[[0, 2]]).all()


def test_a_model_that_is_no_better_wins_about_as_often_as_chance_allows() -> None:
    """Nine tasks of noise: without Holm some task would be won in every fifth trial (1 - .975^9)."""
    random, trials, confidence = np.random.default_rng(17), 30, 0.95
    users, tasks = np.repeat(np.arange(60), 9), np.tile([f"t{number}" for number in range(9)], 60)
    lucky, leads = 0, 0
    for _ in range(trials):
        base, model = random.uniform(0.2, 0.5, (2, len(users)))
        comparison = run(make_hits({"target_attention": base, "urm": model}, users, tasks), draws=500)
        lucky += bool(comparison.won(confidence).any())
        leads += int((comparison.model > comparison.baseline).sum())
    assert leads > 3 * trials  # points ahead, which prove nothing
    assert lucky <= stats.binom.ppf(0.999, trials, 0.05)


def simulate_categories(random: np.random.Generator, num_categories: int) -> pd.DataFrame:
    """Each of 300 users asks two categories; the lift belongs to the category, hardly to the user."""
    users = np.repeat(np.arange(300), 2)
    asked = random.integers(num_categories, size=len(users))
    effect = random.normal(0.1, 0.3, num_categories)[asked]
    recalls = {"target_attention": np.full(len(users), 0.4), "urm": np.clip(0.4 * (1 + effect), 0, 1)}
    return make_hits(recalls, users, np.full(len(users), "unseen"), np.array([f"c{number}" for number in asked]))


def test_intervals_over_new_categories_cover_the_truth_and_those_over_users_alone_do_not() -> None:
    random, trials = np.random.default_rng(23), 80
    crossed, users_alone = 0, 0
    for _ in range(trials):
        hits = simulate_categories(random, 40)
        comparison = run(hits, draws=300)
        assert comparison.categories.tolist() == [hits["held_out_query"].nunique()]
        low, high = comparison.interval(0.90)
        crossed += bool(low[0] <= 0.1 <= high[0])
        plain = run(hits.assign(held_out_query=None), draws=300)
        assert plain.categories.tolist() == [0]
        low, high = plain.interval(0.90)
        users_alone += bool(low[0] <= 0.1 <= high[0])
    # Of 40 categories a percentile interval is a little short of its 90 %.
    assert crossed >= stats.binom.ppf(0.001, trials, 0.87)
    assert users_alone < trials / 2


def test_categories_are_drawn_in_their_task_only() -> None:
    hits = simulate_categories(np.random.default_rng(1), 20)
    other = hits.assign(task="next", held_out_query=None, example_id=hits["example_id"] + len(hits))
    alone, beside = run(other), run(pd.concat([hits, other]))
    place = beside.tasks.index("next")
    assert beside.categories[place] == 0
    assert np.allclose(beside.model_draws[:, place], alone.model_draws[:, 0])


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(5, 2, size=400)
    low, high = mean_interval(values, seed=0)
    error = values.std() / np.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=error / 5)
    wide = mean_interval(values, seed=0, confidence=0.99)
    assert wide[0] < low < high < wide[1]
    assert mean_interval(np.array([0.5]), seed=0) == mean_interval(np.full(3, 0.5), seed=0) == (0.5, 0.5)
