"""What the gate's rule is worth: in worlds without a lift, with a lift, and between trainings of one model."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from components.cli.app import app
from components.config import GatePolicy
from components.evaluation.power import power, smallest_proven
from components.schemas.hits import HITS
from components.settings import Settings, get_settings
from components.studies.trust import Recipe, count_false_alarms, match_examples, simulate_rules, study_runs
from tests.worlds import CONFIGS
from tests.worlds.tables import CUT, put, write

USERS = 80
TASKS = ("next_item", "tail_item")
MakeRecord = Callable[..., pd.DataFrame]
MakeRun = Callable[..., str]


def make_record(seed: int, quality: dict[str, float], cuts: int = 1, known: bool = True) -> pd.DataFrame:
    """Each user with each task at so many cuts, in an order of the seed, with 20 targets an example."""
    random = np.random.default_rng(seed)
    examples = [(f"u{user}", task, cut) for user in range(USERS) for task in TASKS for cut in range(cuts)]
    random.shuffle(examples)
    rows = [
        {"example_id": number, "user_id": user, "task": task, "model": model, "k": 100, "targets": 20,
         "hits": random.binomial(20, share), "held_out_query": None,
         "cut_ts": CUT + timedelta(days=cut) if known else None}
        for number, (user, task, cut) in enumerate(examples) for model, share in quality.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    def make(seed: int, urm: float = 0.5, **how: int | bool) -> str:
        folder, record = tmp_path / f"seed{seed}", make_record(seed, {"target_attention": 0.5, "urm": urm}, **how)
        kind = {"search": False, "exclude_bought": False, "held_out_categories": 0}
        metrics = {"k": 100, "seed": seed, "tasks": dict.fromkeys(TASKS, kind)}
        rows = record.astype(object).where(record.notna(), None).to_dict("records")
        hits = {"hits": write(folder / "hits.parquet", HITS, rows)}
        put(folder, "evaluate", hits, config="amazon_beauty", metrics=metrics)
        return str(folder)

    return make


def study(*runs: str) -> Recipe:
    return study_runs(runs, Settings(configs_dir=CONFIGS))[0]


@pytest.mark.parametrize("urm", [0.5, 0.6])
def test_swapped_labels_prove_a_lift_as_often_as_the_interval_says(urm: float) -> None:
    record = make_record(0, {"target_attention": 0.5, "urm": urm})
    assert 0.01 <= count_false_alarms(record, GatePolicy(), worlds=1000) / 1000 <= 0.045
    assert count_false_alarms(record, GatePolicy(min_lift=0.2), worlds=100) == 0
    assert count_false_alarms(record, GatePolicy(confidence=0.5), worlds=1000) / 1000 == pytest.approx(0.25, abs=0.05)


def test_power_at_the_smallest_lift_proven_is_four_of_five() -> None:
    lift = smallest_proven(0.01, 1.96, 0.02)
    assert power(lift, 0.01, 1.96, 0.02) == pytest.approx(0.8)
    assert power(0.02, 0.01, 1.96, 0.02) == pytest.approx(0.025, abs=1e-4)


def test_examples_are_matched_by_user_task_and_cut_in_any_order(make_run: MakeRun) -> None:
    quality = {"target_attention": 0.5, "urm": 0.5}
    records = [make_record(seed, quality, cuts=2) for seed in (0, 1)]
    later = records[1]["cut_ts"] > CUT
    matched = match_examples([records[0], records[1][later]])
    assert matched is not None and len(matched) == 2 * len(quality) * USERS * len(TASKS)
    names = matched.groupby("example_id")[["user_id", "task", "cut_ts"]].nunique()
    assert (names == 1).all(axis=None) and (matched["cut_ts"] > CUT).all()
    recipe = study(make_run(0, cuts=2), make_run(1, cuts=2), make_run(2, 0.6, cuts=2))  # the third URM is better
    assert (recipe.matched, recipe.pairs) == (2 * USERS * len(TASKS), 6)
    assert recipe.passed == {"target_attention": 0, "urm": 2}  # the better one over each other


def test_chance_of_training_fools_one_training_and_not_three(make_run: MakeRun) -> None:
    recipe = study(*(make_run(seed, urm, known=False) for seed, urm in enumerate((0.5, 0.53, 0.56))))
    assert recipe.matched == USERS * len(TASKS)  # one example per user and task needs no cut
    report, require = simulate_rules(recipe, (0, 0.05, 1))
    assert report[0] > 0.15 and 0.005 < require[0] < 0.06
    assert (report[1] > require[1] > require[0]) and report[2] == require[2] == 1


def test_what_the_command_prints(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("URM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("URM_CONFIGS_DIR", str(CONFIGS))
    get_settings.cache_clear()
    runs = [make_run(seed, cuts=2, known=False) for seed in (0, 1)]
    one = CliRunner().invoke(app, ["trust", runs[0]])
    assert one.exit_code == 0 and "| amazon_beauty, seed 0 |" in one.output and "A/A" not in one.output
    two = CliRunner().invoke(app, ["trust", *runs])
    assert two.exit_code == 0
    cells = [line.split("|")[2].strip() for line in two.output.splitlines() if "| amazon_beauty |" in line]
    assert cells == ["0 1", "report", "require"]
    assert (
        "amazon_beauty: no A/A, since the records do not say which examples of a user are the same (`cut_ts`); "
        "evaluate the runs again."
    ) in " ".join(two.output.split())
