"""How far the gate's rule on the lift can be trusted, from finished runs; nothing is trained.

The rule: the lower bound of the interval of the lift over the headline's tasks is at least `evaluation.gate.min_lift`.

**Labels swapped.** With h_u = (baseline + URM) / 2 and d_u = (URM - baseline) / 2 of user u, worlds without a lift are
h_u ± d_u with a random sign per user. What the rule proves there is a false alarm of chance among users: half of what
the interval leaves out is meant, 2.5 % of a 95 % interval. Users alone are drawn, held-out categories are not.

**A/A.** One training is held against another of the same model that differs in the seed, on the examples that all
runs have: those of equal user, task and cut. The two orders of a pair are mirror images and pairs share trainings, so
that few pairs say little. Where records do not say which examples are equal there is no A/A. Means per user would
not replace it: they are sound, but two samples of a user's examples differ, so that their intervals are wider than the
gate's, which is on equal examples, and pass less often.

**Both rules.** Simulated releases of a model with lift L have trainings of lift L + u + e_i, where u is normal with the
standard deviation of the bootstrap's draws, and e_i with that of the lift from training to training. `report` decides
by one training and its users, `require` by `MIN_TRAININGS` and `Comparison.training_spread`. What passes at L = 0 is a
false alarm. The spread has some chance among users in it, so that this errs on the side of false alarms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table

from components.addresses import fetch
from components.config import GatePolicy, load_named_config
from components.evaluation.bootstrap import (
    Comparison,
    compare,
    draw_weights,
    relative_lift,
    sum_by_user,
)
from components.evaluation.metrics import Floats, recall
from components.evaluation.policy import MIN_TRAININGS, find_training_interval
from components.evaluation.power import errors_of, power, smallest_proven
from components.evaluation.report import title
from components.evaluation.summary import BASELINE, CANDIDATE
from components.schemas.hits import read_hits
from components.settings import Settings
from components.studies.comparison import FinishedRun, check_comparable, read_run

DRAWS = 1000  # of each bootstrap
WORLDS = 400  # with labels swapped, of each run
RELEASES = 4000  # simulated
LIFTS = (0.01, 0.02, 0.03, 0.05, 0.08)
POWER_HEAD = [f"power {lift:+.0%}" for lift in LIFTS]
KEY = ["user_id", "task", "cut_ts"]  # what examples of several runs are matched by


@dataclass(frozen=True)
class Training:
    """One run by itself."""

    seed: int
    comparison: Comparison  # URM against target attention, the headline's tasks
    users: int
    false_alarms: int  # of WORLDS


@dataclass(frozen=True)
class Recipe:
    """The runs of one configuration."""

    config: str
    policy: GatePolicy
    trainings: tuple[Training, ...]
    matched: int  # examples that all runs have; 0 where there is no A/A
    passed: dict[str, int]  # ordered A/A pairs in which the rule proves a lift, by model

    @property
    def pairs(self) -> int:
        """Ordered pairs of trainings."""
        return len(self.trainings) * (len(self.trainings) - 1)

    @property
    def lifts(self) -> list[float]:
        """Lift of each training."""
        return [training.comparison.ratio for training in self.trainings]

    @property
    def spread(self) -> float:
        """Standard deviation of the lift from training to training; of two at least."""
        return float(np.std(self.lifts, ddof=1))


def study_runs(run_dirs: Sequence[str], settings: Settings) -> list[Recipe]:
    """One recipe per configuration of evaluated runs, in the order given.

    Raises:
        MissingInputError: A run has no evaluation.
        DataError: Runs of one configuration share a seed, or differ in cut-off, tasks or settings.
        ConfigError: A run's configuration, which has the gate's policy, is not there any more.
    """
    groups: dict[str, list[FinishedRun]] = {}
    for run_dir in run_dirs:
        run = read_run(run_dir, settings.configs_dir)
        groups.setdefault(run.config, []).append(run)
    for runs in groups.values():
        check_comparable(runs)
    return [_study(runs, settings) for runs in groups.values()]


def _study(runs: Sequence[FinishedRun], settings: Settings) -> Recipe:
    policy = load_named_config(runs[0].config, settings.configs_dir).evaluation.gate
    k = int(runs[0].metrics["k"])
    records = [read_headline(run, k, settings.cache_path / "inputs") for run in runs]
    trainings = []
    for run, record in zip(runs, records, strict=True):
        comparison = compare(record, CANDIDATE, BASELINE, k=k, draws=DRAWS, seed=0)
        alarms = 0 if comparison.few_users else count_false_alarms(record, policy)
        trainings.append(Training(run.metrics["seed"], comparison, record["user_id"].nunique(), alarms))
    recipe = Recipe(runs[0].config, policy, tuple(trainings), 0, {})
    if len(records) == 1 or (matched := match_examples(records)) is None:
        return recipe
    passed = {model: _count_passes(matched, model, k, policy) for model in (BASELINE, CANDIDATE)}
    return replace(recipe, matched=matched["example_id"].nunique(), passed=passed)


def read_headline(run: FinishedRun, k: int, cache: Path) -> pd.DataFrame:
    """Rows of URM and target attention in the headline's tasks."""
    hits = read_hits(str(fetch(run.hits, cache)), k, {CANDIDATE, BASELINE})
    return hits[hits["task"].isin(run.headline)]


def count_false_alarms(hits: pd.DataFrame, policy: GatePolicy, worlds: int = WORLDS, seed: int = 0) -> int:
    """In how many worlds with labels swapped by user the rule proves a lift, from rows of one cut-off."""
    rows = hits.assign(recall=recall(hits["hits"], hits["targets"], hits["k"]))
    recalls = rows.pivot(index=["example_id", "user_id", "task"], columns="model", values="recall").reset_index()
    users, tasks = (pd.factorize(recalls[name])[0] for name in ("user_id", "task"))
    shape = num_users, num_tasks = 1 + users.max(), 1 + tasks.max()
    of_urm, of_baseline = recalls[CANDIDATE].to_numpy(), recalls[BASELINE].to_numpy()
    number, middle, apart = (
        sum_by_user(shape, users, tasks, values)
        for values in (np.ones(len(recalls)), (of_baseline + of_urm) / 2, (of_urm - of_baseline) / 2)
    )  # [users, T] each
    signs = np.random.default_rng((seed, 2)).choice([-1.0, 1.0], size=(num_users, worlds))
    blocks: list[Floats] = []
    for weights in draw_weights(num_users, DRAWS, seed):
        drawn = weights @ number  # [draws, T]
        common = (weights @ middle / drawn).mean(axis=1, keepdims=True)
        gap = np.zeros((len(weights), worlds))
        for task in range(num_tasks):
            gap += weights @ (apart[:, task, None] * signs) / drawn[:, task, None] / num_tasks
        blocks.append(relative_lift(common + gap, common - gap))
    low = np.nanquantile(np.concatenate(blocks), (1 - policy.confidence) / 2, axis=0)
    return int((low >= policy.min_lift).sum())


def match_examples(records: Sequence[pd.DataFrame]) -> pd.DataFrame | None:
    """Rows of the examples that all runs have, numbered alike, with the place of the run in a column `run`.

    None where user, task and cut do not name one example, as in older records of several cuts per user.
    """
    rows = pd.concat([record.assign(run=run) for run, record in enumerate(records)], ignore_index=True)
    if rows.duplicated([*KEY, "model", "run"]).any():
        return None
    rows["example_id"] = rows.groupby(KEY, dropna=False, sort=False).ngroup()
    examples = rows.groupby("example_id")[["run", "targets"]].nunique()
    if (examples["targets"] > 1).any():
        return None
    common = examples.index[examples["run"] == len(records)]
    return rows[rows["example_id"].isin(common)] if len(common) else None


def _count_passes(matched: pd.DataFrame, model: str, k: int, policy: GatePolicy) -> int:
    """Ordered pairs of trainings in which the rule proves a lift of the one over the other."""
    rows = matched[matched["model"] == model]
    passed = 0
    for pair in combinations(sorted(rows["run"].unique()), 2):
        named = rows[rows["run"].isin(pair)].assign(model=rows["run"].astype(str))
        there = compare(named, str(pair[0]), str(pair[1]), k=k, draws=DRAWS, seed=0)
        back = replace(
            there,
            model=there.baseline,
            baseline=there.model,
            model_draws=there.baseline_draws,
            baseline_draws=there.model_draws,
        )
        passed += sum(order.ratio_interval(policy.confidence)[0] >= policy.min_lift for order in (there, back))
    return passed


def simulate_rules(recipe: Recipe, lifts: Sequence[float], seed: int = 0) -> tuple[Floats, Floats]:
    """Shares of simulated releases with these lifts that `report` and that `require` pass, ([lifts], [lifts])."""
    comparison, policy = recipe.trainings[0].comparison, recipe.policy
    of_users = float(
        np.nanstd(relative_lift(comparison.model_draws.mean(axis=1), comparison.baseline_draws.mean(axis=1)))
    )
    quantile = errors_of(comparison, policy.confidence)[1]
    random = np.random.default_rng(seed)
    noise = random.normal(0, of_users, (RELEASES, 1)) + random.normal(0, recipe.spread, (RELEASES, MIN_TRAININGS))
    one = noise[:, 0] - quantile * of_users
    several = np.array([find_training_interval(comparison, trainings, policy.confidence)[0] for trainings in noise])
    needed = policy.min_lift - np.asarray(lifts)
    return (one[:, None] >= needed).mean(axis=0), (several[:, None] >= needed).mean(axis=0)


def describe(recipes: Sequence[Recipe]) -> list[Table | str]:
    """What was found, as tables and sentences."""
    parts: list[Table | str] = [_show_trainings(recipes)]
    several = [recipe for recipe in recipes if len(recipe.trainings) > 1]
    if several:
        parts += [_show_recipes(several), _show_rules(several)]
    parts += [
        f"{recipe.config}: no A/A, since the records do not say which examples of a user are the same (`cut_ts`); "
        "evaluate the runs again."
        for recipe in several
        if not recipe.matched
    ]
    return parts


def _show_trainings(recipes: Sequence[Recipe]) -> Table:
    head = ["examples", "users", "lift", "min_lift", "false alarms", *POWER_HEAD, "proven in 4 of 5"]
    table = _make_table(f"One training; false alarms: labels swapped in {WORLDS} worlds", "run", *head)
    for recipe in recipes:
        for training in recipe.trainings:
            found, policy = training.comparison, recipe.policy
            errors = errors_of(found, policy.confidence)
            table.add_row(
                f"{recipe.config}, seed {training.seed}",
                f"{found.examples.sum():,}",
                f"{training.users:,}",
                f"{found.ratio:+.1%}",
                f"{policy.min_lift:+.1%}",
                f"{training.false_alarms / WORLDS:.1%}",
                *(f"{power(lift, *errors, policy.min_lift):.0%}" for lift in LIFTS),
                f"{smallest_proven(*errors, policy.min_lift):+.1%}",
            )
    return table


def _show_recipes(recipes: Sequence[Recipe]) -> Table:
    models = (BASELINE, CANDIDATE)
    head = ["seeds", "lift, sd", "false alarms", "A/A: examples", *(f"A/A: {title(model)}" for model in models)]
    table = _make_table("Several trainings", "runs", *head, "proven in 4 of 5: by one", "by all")
    for recipe in recipes:
        # As in the gate, the users of one run stand for those of all.
        first, policy = recipe.trainings[0].comparison, recipe.policy
        errors = [errors_of(first, policy.confidence, lifts) for lifts in (None, recipe.lifts)]
        table.add_row(
            recipe.config,
            " ".join(str(training.seed) for training in recipe.trainings),
            f"{np.mean(recipe.lifts):+.1%} ± {recipe.spread:.1%}",
            f"{sum(training.false_alarms for training in recipe.trainings) / len(recipe.trainings) / WORLDS:.1%}",
            f"{recipe.matched:,}" if recipe.matched else "-",
            *(f"{recipe.passed[model]} of {recipe.pairs}" if recipe.matched else "-" for model in models),
            *(f"{smallest_proven(*error, policy.min_lift):+.1%}" for error in errors),
        )
    return table


def _show_rules(recipes: Sequence[Recipe]) -> Table:
    name = "Simulated releases, with chance of training: share that passes"
    table = _make_table(name, "runs", "evaluation.gate.trainings", "false alarms", *POWER_HEAD)
    for recipe in recipes:
        shares = simulate_rules(recipe, (0, *LIFTS))
        for rule, passed in zip(("report", "require"), shares, strict=True):
            table.add_row(recipe.config, rule, f"{passed[0]:.1%}", *(f"{share:.0%}" for share in passed[1:]))
    return table


def _make_table(name: str, *head: str) -> Table:
    table = Table(title=name, title_justify="left", box=box.MARKDOWN)
    for place, column in enumerate(head):
        table.add_column(column, justify="right" if place else "left", no_wrap=not place)
    return table
