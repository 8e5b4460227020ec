"""Study `occasions`: does a language model know what an occasion is bought for?

The truth is in the events, and nobody wrote it down: a category's lift in the week of an occasion over its share on
ordinary days. The pretrained backbone at full depth, the same network with random weights and the text encoder score
the categories for each occasion. The figure is the AUC of these scores against lift >= 1.5 per occasion, and its mean
over occasions. Categories that share a word with the occasion's names are left out.

Every model chooses a method on half of the occasions (`Calendar.halves`) and scores the others with it; random weights
also score with the method of the pretrained ones. Two controls: the mean log lift over the
occasions of the choice, and the pretrained backbone's scores for another occasion, where two are scored. No choice
reads events of the test split, but the occasions of the test weeks are scored; a reading without them needs others.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from functools import cached_property, partial
from typing import Any

import mlflow
import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from rich.table import Table
from scipy.stats import spearmanr

from components.config import RunConfig, load_document
from components.device import choose_device, set_threads
from components.exceptions import DataError
from components.items.text import TextEncoder
from components.settings import Settings
from components.storage import StageReport, StageRun
from components.studies.abilities.association import (
    Method,
    Rate,
    rate_by_encoder,
    rate_by_language_model,
    score_all,
)
from components.studies.abilities.calendar import Calendar, CategoryPath, count_events, measure_lifts
from components.studies.abilities.likelihood import open_language_model
from components.studies.finished import hide_progress_bars
from components.tracking import track

MIN_LIFTED = 3  # categories of an occasion; the AUC of fewer is chance
MIN_EVENTS = 500  # of a category before the test split: the lift of a rarer one is mostly noise
LIFTED, LIFTED_MORE = 1.5, 2.0
NUM_RANDOM = 3  # networks with random weights
DRAWS = 2000
CONFIDENCE = 0.95
SHOWN = 5  # categories per occasion
PRETRAINED, RANDOM, ENCODER = "pretrained", "random weights", "text encoder"
RANDOM_OWN = "random weights: own method"
SEASONAL, SWAPPED = "mean lift of the choice", "pretrained: another occasion"  # controls
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Scores = Mapping[str, Sequence[Floats]]  # by model, [occasions, categories] each; several are averaged by their AUC


@dataclass(frozen=True)
class Truth:
    """What is bought for some occasions, [occasions, categories] each."""

    lifted: Bools
    judged: Bools  # false where the category shares a word with the occasion


@dataclass(frozen=True)
class World:
    """Occasions, categories and lifts."""

    calendar: Calendar
    paths: Sequence[CategoryPath]
    events: npt.NDArray[np.int64]  # of each category before the test split, [categories]
    lifts: Floats  # [occasions of the calendar, categories]
    nearby: Floats  # the same against ordinary days of the season
    test_start: date

    @cached_property
    def choice(self) -> list[int]:
        """Places of the occasions that serve the choice of a method."""
        return self._measurable(0)

    @cached_property
    def report(self) -> list[int]:
        """Places of the occasions that are scored with the method chosen."""
        return self._measurable(1)

    def in_test(self, place: int) -> bool:
        """Whether an occasion's day is in the test split."""
        return self.calendar.occasions[place].day >= self.test_start

    def _measurable(self, half: int) -> list[int]:
        """Places of the half's occasions that enough is bought for."""
        occasions = self.calendar.halves(self.test_start)[half]
        places = [self.calendar.occasions.index(occasion) for occasion in occasions]
        truth = self.truth(places)
        enough = (truth.lifted & truth.judged).sum(axis=1) >= MIN_LIFTED
        return [place for place, some in zip(places, enough, strict=True) if some]

    def truth(self, places: Sequence[int], lifts: Floats | None = None, least: float = LIFTED) -> Truth:
        """Truth of some occasions."""
        occasions = [self.calendar.occasions[place] for place in places]
        shared = [[occasion.shares_word(path) for path in self.paths] for occasion in occasions]
        return Truth((self.lifts if lifts is None else lifts)[places] >= least, ~np.array(shared))

    def score(self, rate: Rate) -> dict[Method, Floats]:
        """Scores of all methods, [occasions of the calendar, categories] each."""
        names = [occasion.name for occasion in self.calendar.occasions]
        words = [path[-1] for path in self.paths]
        return score_all(rate, self.calendar.templates, names, self.calendar.ordinary, words)


def options(settings: Settings, config: RunConfig) -> dict[str, Any]:
    """What decides the result besides code and configuration: the occasions and the templates.

    Raises:
        ConfigError: The configuration has no file of occasions, or it has an error.
    """
    content = _read_calendar(settings, config).model_dump_json()
    return {"occasions": hashlib.sha256(content.encode()).hexdigest()}


def run(stage: StageRun) -> StageReport:
    """Measure; the metrics are in result.json, in `occasions.json` and in MLflow."""
    set_threads(stage.settings)
    hide_progress_bars()
    world = _read_world(stage)
    with track(stage):
        chosen, scores = _score_models(stage, world)
        scores |= _controls(world, scores[PRETRAINED][0])
        names = [world.calendar.occasions[place].name for place in world.choice]
        metrics = {"chosen_on": names, "chosen": chosen, **_judge(world, scores, stage.config.seed)}
        mlflow.log_metrics({f"auc.{name}": row["auc"] for name, row in metrics["auc"].items()})
        mlflow.log_dict(metrics, "occasions.json")
    (stage.output / "occasions.json").write_text(json.dumps(metrics, indent=2) + "\n")
    _tabulate(world, scores).to_parquet(stage.output / "scores.parquet", index=False)
    return StageReport(
        outputs={"occasions": "occasions.json", "scores": "scores.parquet"},
        counts={"categories": len(world.paths), "occasions": len(world.calendar.occasions)},
        metrics=metrics,
    )


def table(metrics: dict[str, Any]) -> Table:
    """AUC of every model for the occasions that served no choice."""
    names = list(metrics["auc"])
    shown = Table("occasion", "lifted", *names, title="AUC of the scores against lift", title_justify="left")
    for row in metrics["occasions"]:
        shown.add_row(row["name"], str(row["lifted"]), *(f"{row['auc'][name]:.2f}" for name in names))
    shown.add_row("mean", "", *(_interval(metrics["auc"][name], "") for name in names))
    shown.add_row("pretrained minus it", "", *(_interval(metrics["ahead"].get(name), "+") for name in names))
    return shown


def _interval(figure: Mapping[str, float] | None, sign: str) -> str:
    if figure is None:
        return ""
    return f"{figure['auc']:{sign}.3f} [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"


def weighted_auc(scores: Floats, positive: Bools, weights: Floats) -> Floats:
    """Probability that a positive has the higher score, ties count half, for each row of weights [draws, n].

    NaN where a draw has no positive or no negative.
    """
    values, group = np.unique(scores, return_inverse=True)
    shape = (len(values), len(scores))
    member = np.zeros(shape)
    member[group, np.arange(len(scores))] = 1
    positives, negatives = (weights * positive) @ member.T, (weights * ~positive) @ member.T
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    auc: Floats = (positives * below).sum(axis=1) / np.where(pairs > 0, pairs, np.nan)
    return auc


def bootstrap_auc(scores: Scores, truth: Truth, seed: int, draws: int = DRAWS) -> dict[str, Floats]:
    """Mean AUC over occasions by model, first of the data itself, then of each draw [1 + draws].

    Occasions and categories are drawn with replacement, a category for all occasions at once; every model sees the
    same draws. An occasion without a lifted category is left out of the mean, which is NaN where none is left.
    """
    random = np.random.default_rng(seed)
    num_occasions, num_categories = truth.lifted.shape
    by_category = _draw(random, draws, num_categories)
    by_occasion = _draw(random, draws, num_occasions)
    means: dict[str, Floats] = {}
    for name, several in scores.items():
        aucs = np.stack([_aucs(some, truth, by_category) for some in several]).mean(axis=0)
        known = np.isfinite(aucs)
        counted = (known * by_occasion).sum(axis=1)
        means[name] = (np.where(known, aucs, 0) * by_occasion).sum(axis=1) / np.where(counted > 0, counted, np.nan)
    return means


def compare(scores: Scores, truth: Truth, seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """`auc`: mean AUC of every model; `ahead`: that of the pretrained backbone minus it; with percentile intervals."""
    means = bootstrap_auc(scores, truth, seed)
    ahead = {name: means[PRETRAINED] - draws for name, draws in means.items() if name != PRETRAINED}
    return {"auc": _summarise(means), "ahead": _summarise(ahead)}


def _summarise(means: Mapping[str, Floats]) -> dict[str, dict[str, float]]:
    tail = (1 - CONFIDENCE) / 2
    return {
        name: {
            "auc": float(draws[0]),
            "low": float(np.nanquantile(draws[1:], tail)),
            "high": float(np.nanquantile(draws[1:], 1 - tail)),
        }
        for name, draws in means.items()
    }


def _draw(random: np.random.Generator, draws: int, size: int) -> Floats:
    drawn = random.multinomial(size, np.full(size, 1 / size), size=draws)
    return np.concatenate([np.ones((1, size)), drawn])


def _aucs(scores: Floats, truth: Truth, weights: Floats) -> Floats:
    """AUC of each occasion [draws, occasions]."""
    rows = zip(scores, truth.lifted, truth.judged, strict=True)
    return np.stack([weighted_auc(row[kept], lifted[kept], weights[:, kept]) for row, lifted, kept in rows], axis=1)


def _mean_auc(scores: Floats, truth: Truth) -> float:
    return float(np.nanmean(_aucs(scores, truth, np.ones((1, scores.shape[1])))))


def _read_calendar(settings: Settings, config: RunConfig) -> Calendar:
    return load_document(settings.configs_dir / "occasions" / f"{config.name}.yaml", Calendar)


def _read_world(stage: StageRun) -> World:
    calendar = _read_calendar(stage.settings, stage.config)
    counts = count_events(stage.path("validate", "events"), stage.path("validate", "items"), calendar)
    test_start = calendar.local_day(stage.config.features.split.test_start)
    totals = counts[[day < test_start for day in counts.index]].sum().to_numpy()
    kept = totals >= MIN_EVENTS
    world = World(
        calendar,
        [tuple(path) for path, known in zip(counts.columns, kept, strict=True) if known],
        totals[kept],
        measure_lifts(counts, calendar, test_start)[:, kept],
        measure_lifts(counts, calendar, test_start, nearby=True)[:, kept],
        test_start,
    )
    if not (world.choice and world.report):
        raise DataError(
            "the occasions",
            expected=f"some of both halves with at least {MIN_LIFTED} categories of lift {LIFTED}",
            got=f"{len(world.choice)} for the choice, {len(world.report)} for the report",
            remedy="name others in configs/occasions",
        )
    return world


def _open_network(stage: StageRun, seed: int | None = None) -> Rate:
    """The backbone at full depth: pretrained, or with random weights of a seed."""
    return rate_by_language_model(open_language_model(stage.settings, stage.config.urm.backbone, seed))


def _open_encoder(stage: StageRun) -> Rate:
    items = stage.config.items
    device = torch.device(choose_device(stage.settings))
    return rate_by_encoder(TextEncoder(items.text_encoder, device, items.batch_size))


def _score_models(stage: StageRun, world: World) -> tuple[dict[str, Any], dict[str, list[Floats]]]:
    """What each model chose, and the scores [occasions of the report, categories] of each, a list of seeds."""
    found = {PRETRAINED: _score(stage, world, PRETRAINED, _open_network)}
    found[ENCODER] = _score(stage, world, ENCODER, _open_encoder)
    networks = [f"{RANDOM}: seed {seed}" for seed in range(NUM_RANDOM)]
    for seed, name in enumerate(networks):
        found[name] = _score(stage, world, name, partial(_open_network, seed=seed))
    truth = world.truth(world.choice)
    chosen = {name: _choose({method: some[world.choice] for method, some in scores.items()}, truth)
              for name, scores in found.items()}  # fmt: skip

    def report(name: str, by: str) -> Floats:
        return found[name][Method(**chosen[by]["method"])][world.report]

    scores = {name: [report(name, name)] for name in (PRETRAINED, ENCODER)}
    scores[RANDOM] = [report(name, PRETRAINED) for name in networks]
    scores[RANDOM_OWN] = [report(name, name) for name in networks]
    return chosen, scores


def _score(stage: StageRun, world: World, name: str, open_rate: Callable[[StageRun], Rate]) -> dict[Method, Floats]:
    """Scores of a model, kept for another attempt."""
    file = stage.scratch / f"{name}.npz"
    if not file.exists():
        stage.report_progress(name)
        scores = world.score(open_rate(stage))
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".half.npz")
        np.savez(half, allow_pickle=False, **{json.dumps(asdict(method)): some for method, some in scores.items()})
        half.replace(file)
    with np.load(file) as kept:
        return {Method(**json.loads(method)): kept[method] for method in kept.files}


def _choose(scores: Mapping[Method, Floats], truth: Truth) -> dict[str, Any]:
    """The method with the highest mean AUC over the occasions of the choice, and how the others did."""
    aucs = {method: _mean_auc(some, truth) for method, some in scores.items()}
    ranked = sorted(aucs, key=lambda method: -aucs[method])  # the first of equals
    return {
        "method": asdict(ranked[0]),
        "methods": len(aucs),
        "auc": aucs[ranked[0]],
        "median": float(np.median(list(aucs.values()))),
        "best_of_template": {method.template: aucs[method] for method in reversed(ranked)},
        "best_against": {method.against: aucs[method] for method in reversed(ranked)},
    }


def _controls(world: World, scores: Floats) -> dict[str, list[Floats]]:
    """Scores that know no words, and the pretrained backbone's scores for each other occasion, where there is one."""
    seasonal = np.log(world.lifts[world.choice]).mean(axis=0)
    swapped = [np.roll(scores, shift, axis=0) for shift in range(1, len(scores))]
    return {SEASONAL: [np.tile(seasonal, (len(world.report), 1))]} | ({SWAPPED: swapped} if swapped else {})


def _judge(world: World, scores: Scores, seed: int) -> dict[str, Any]:
    """The comparison under several readings of the truth, and every occasion by itself."""
    truth = world.truth(world.report)
    untested = [row for row, place in enumerate(world.report) if not world.in_test(place)]
    readings = {
        "lift of at least 2": compare(scores, world.truth(world.report, least=LIFTED_MORE), seed),
        "lift over the season": compare(scores, world.truth(world.report, world.nearby), seed),
    }
    if untested:
        earlier = {name: [some[untested] for some in several] for name, several in scores.items()}
        before = Truth(truth.lifted[untested], truth.judged[untested])
        readings["without the test weeks"] = compare(earlier, before, seed)
    return compare(scores, truth, seed) | {
        "readings": readings,
        "occasions": [_describe(world, scores, truth, row) for row in range(len(world.report))],
    }


def _describe(world: World, scores: Scores, truth: Truth, row: int) -> dict[str, Any]:
    place, judged = world.report[row], truth.judged[row]
    lifts = world.lifts[place]
    top = [number for number in np.argsort(-scores[PRETRAINED][0][row]).tolist() if judged[number]][:SHOWN]
    one = Truth(truth.lifted[row : row + 1], truth.judged[row : row + 1])
    return {
        "name": world.calendar.occasions[place].name,
        "in_test_split": world.in_test(place),
        "judged": int(judged.sum()),
        "lifted": int((truth.lifted[row] & judged).sum()),
        "auc": {
            name: float(np.mean([_mean_auc(some[row : row + 1], one) for some in several]))
            for name, several in scores.items()
        },
        "spearman": {
            name: float(np.mean([spearmanr(some[row][judged], lifts[judged]).statistic for some in several]))
            for name, several in scores.items()
        },
        "top": [{"category": " > ".join(world.paths[number]), "lift": float(lifts[number])} for number in top],
    }


def _tabulate(world: World, scores: Scores) -> pd.DataFrame:
    """Lifts and scores of every judged occasion and category; the mean over seeds."""
    frames = []
    for row, place in enumerate(world.report):
        occasion = world.calendar.occasions[place]
        columns = {
            "occasion": occasion.name,
            "category": [" > ".join(path) for path in world.paths],
            "events": world.events,
            "lift": world.lifts[place],
            "lift_over_season": world.nearby[place],
            "judged": world.truth([place]).judged[0],
        }
        means = {name: np.mean([some[row] for some in several], axis=0) for name, several in scores.items()}
        frames.append(pd.DataFrame(columns | means))
    return pd.concat(frames)
