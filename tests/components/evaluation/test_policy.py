"""The policy: each rule breaks alone, and the verdict says why."""

from dataclasses import replace

import numpy as np
import pytest

from components.config import EvaluationConfig
from components.evaluation.bootstrap import Comparison
from components.evaluation.policy import judge

LONG_TAIL_WORSE = (
    "Proven more than 10% worse than target attention at 95% confidence, Holm-corrected: long_tail (-30.0%)."
)
TASKS = ("next_purchase", "discovery", "long_tail")


def compared(lifts: list[float], noise: float = 0.01) -> Comparison:
    """Three tasks with a baseline of .2 and draws of the given noise around the lifts."""
    random = np.random.default_rng(0)
    baseline = np.full(3, 0.2)
    model = baseline * (1 + np.array(lifts))
    draws = random.normal(0, noise, (500, 3)) * 0.2
    return Comparison(TASKS, np.array([100, 200, 300]), baseline, model, np.tile(baseline, (500, 1)), model + draws)


def config(**policy: float) -> EvaluationConfig:
    gate = {"min_mean_lift": 0.05, "min_tasks_won": 2, "max_task_loss": 0.1} | policy
    return EvaluationConfig.model_validate({"gate": gate})


def test_passes_and_says_what_was_found() -> None:
    verdict = judge(compared([0.2, 0.1, -0.02]), config())
    assert verdict["passed"] is True
    assert verdict["reasons"] == []
    assert verdict["verdict"].startswith(
        "The model may be released. On 600 held-out cases, the 100 items it recalls hold 9.3% more"
    )
    assert "than those of the target-attention model, on average over 3 tasks (95% interval" in verdict["verdict"]
    assert "leads in 2 of 3, does best in next_purchase (+20.0%) and worst in long_tail (-2.0%)" in verdict["verdict"]


@pytest.mark.parametrize(
    ("lifts", "policy", "reason"),
    [
        ([0.02, 0.02, 0.02], {}, r"Mean lift over the tasks is +2.0%, below the required +5.0%."),
        ([0.4, -0.01, -0.01], {}, r"URM leads in 1 of 3 tasks, below the required 2."),
        ([0.4, 0.4, -0.3], {}, LONG_TAIL_WORSE),
    ],
)  # fmt: skip
def test_each_rule_fails_alone(lifts: list[float], policy: dict[str, float], reason: str) -> None:
    verdict = judge(compared(lifts), config(**policy))
    assert verdict["passed"] is False
    assert verdict["reasons"] == [reason]
    assert "breaks 1 of the 3 rules" in verdict["verdict"]


def test_a_loss_that_may_be_chance_is_not_held_against_a_task() -> None:
    assert judge(compared([0.4, 0.4, -0.15], noise=0.2), config())["passed"] is True
    assert judge(compared([0.4, 0.4, -0.15], noise=0.005), config())["passed"] is False


def test_a_margin_admits_a_loss() -> None:
    assert judge(compared([0.4, 0.4, -0.3]), config(max_task_loss=0.35))["passed"] is True


def test_a_task_without_a_lift_is_neither_best_nor_worst_and_is_named_apart() -> None:
    some = compared([-0.02, -0.1, -0.2])
    bases = {name: getattr(some, name) * [1, 1, 0] for name in ("baseline", "baseline_draws")}
    nothing = replace(some, **bases)
    verdict = judge(nothing, config())["verdict"]
    assert "on average over 2 tasks" in verdict
    assert f"does best in {TASKS[0]} (-2.0%) and worst in {TASKS[1]} (-10.0%)" in verdict
    assert verdict.endswith("In 1 more target attention recalls nothing, so that no lift is defined.")


def test_no_lift_at_all_fails_with_its_reason() -> None:
    nothing = Comparison(TASKS, np.array([1, 1, 1]), np.zeros(3), np.zeros(3), np.zeros((10, 3)), np.zeros((10, 3)))
    verdict = judge(nothing, config())
    assert verdict["passed"] is False
    assert "target attention finds nothing" in verdict["reasons"][0]
    assert "nan" not in verdict["verdict"]
