import time

import pytest

from components.urm.training.schedule import Budget


def test_rates_are_those_of_the_steps_while_these_are_ahead_of_the_clock():
    free, timed = Budget(100, 1e9), Budget(100, 1000)
    assert timed.rate(0) == free.rate(0)  # no time has passed for the rate before the first step
    for step in range(1, 101):
        timed.read(10.0 * step)  # exactly as far as the steps
        assert timed.rate(step) == free.rate(step)


def test_the_clock_lowers_the_rate_where_it_is_ahead():
    budget = Budget(100, 1000)
    budget.read(500)
    assert budget.progress(10) == 0.5
    assert budget.rate(10) == Budget(100, 1e9).rate(50)
    assert budget.progress(70) == 0.7
    assert not budget.is_spent
    budget.read(1000)
    assert budget.is_spent


def test_a_training_that_ends_by_the_clock_has_warmed_up_by_it():
    budget = Budget(100_000, 1000)
    budget.read(25)
    assert budget.rate(50) == pytest.approx(0.5, abs=0.01)  # half of the warm-up's share of the time
    budget.read(60)
    assert budget.rate(120) > 0.98


def test_the_time_counts_only_when_read_and_then_as_it_is():
    budget = Budget(100, 0.02)
    time.sleep(0.03)
    assert budget.seconds > 0.02
    assert budget.progress(0) == 0
    assert not budget.is_spent
    budget.read()
    assert budget.is_spent


def test_a_resumed_budget_knows_the_time_already_spent():
    second = Budget(100, 1000)
    second.resume(400.0)
    assert second.progress(10) == 0.4
    assert second.seconds == pytest.approx(400, abs=1)
