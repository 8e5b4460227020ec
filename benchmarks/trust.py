"""What the scores of `urm occasions` are worth: popularity re-ranked by them in the weeks of the occasions.

    python -m benchmarks.trust --config complete_journey --run-dir default --output trust.json

needs the stages ingest and validate and the study occasions of the run. Nothing is trained: items are ranked by

    the users who bought it in the four weeks before  x  exp(trust x z)

with z the score of its category for the occasion, mean 0 and deviation 1 over the categories. The trust is the one of
TRUSTS with the highest mean recall over the earlier occasions of the year, so the first occasion only serves the fit.
`lift` is the ceiling: z is the log of what the category's lift will be. Recall is that of a user's purchases of the
occasion's week in the first 100 items, mean over users; `new` counts what the user never bought before.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq

from benchmarks.bench import find_run, parse_run, write_figures
from components.config import load_document
from components.settings import get_settings
from components.studies.abilities.calendar import Calendar
from components.studies.finished import FinishedRun

TRUSTS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
BEFORE = timedelta(days=28)
K = 100
DRAWS = 2000
KINDS = ("all", "new")
MODELS = ("pretrained", "random weights", "text encoder", "lift")
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Week:
    """The week of an occasion."""

    name: str
    popularity: pd.Series  # users who bought an item in the four weeks before, by item id
    bought: Mapping[str, pd.DataFrame]  # kind of purchase → user_id, item_id, each pair once
    scores: pd.DataFrame  # z of each item of `popularity` (index), by model (columns)


def rank_items(week: Week, model: str, trust: float, k: int = K) -> npt.NDArray[np.int64]:
    """The first k items; of equals, the one with the lower id."""
    scores = week.popularity * np.exp(trust * week.scores[model])
    ranked: npt.NDArray[np.int64] = scores.sort_index().sort_values(ascending=False, kind="stable").index.to_numpy()
    return ranked[:k]


def recall_by_user(bought: pd.DataFrame, ranked: npt.NDArray[np.int64]) -> pd.Series:
    """Share of each user's purchases that is ranked, by user id."""
    return bought["item_id"].isin(ranked).groupby(bought["user_id"]).mean()


def fit_trust(weeks: Sequence[Week], model: str, kind: str) -> float:
    """The trust with the highest mean recall over the weeks; the lower of equals."""
    means = [
        np.mean([recall_by_user(week.bought[kind], rank_items(week, model, trust)).mean() for week in weeks])
        for trust in TRUSTS
    ]
    return TRUSTS[int(np.argmax(means))]


def measure(weeks: Sequence[Week], kind: str, seed: int) -> dict[str, Any]:
    """Recall of popularity and what the scores add, in every week but the first, and over these weeks.

    Users of each week are drawn with replacement for the interval.
    """
    random = np.random.default_rng(seed)
    report: dict[str, Any] = {}
    for model in MODELS:
        rows, draws = [], []
        for place in range(1, len(weeks)):
            week = weeks[place]
            trust = fit_trust(weeks[:place], model, kind)
            plain = recall_by_user(week.bought[kind], rank_items(week, model, 0.0))
            gains = (recall_by_user(week.bought[kind], rank_items(week, model, trust)) - plain).to_numpy()
            weights = random.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=DRAWS) / len(gains)
            draws.append(weights @ gains)
            rows.append({"occasion": week.name, "trust": trust, "popularity": float(plain.mean())})
            rows[-1] |= {"gain": float(gains.mean()), "users": len(gains)}
        low, high = np.quantile(np.mean(draws, axis=0), [0.025, 0.975])
        mean = {name: float(np.mean([row[name] for row in rows])) for name in ("popularity", "gain")}
        report[model] = mean | {"low": float(low), "high": float(high), "weeks": rows}
    return report


def make_week(name: str, scores: pd.DataFrame, log: pd.DataFrame, categories: pd.Series, calendar: Calendar) -> Week:
    """The week of an occasion from the log (user_id, item_id, day) and the study's scores of the occasion."""
    occasion = next(occasion for occasion in calendar.occasions if occasion.name == name)
    first, last = calendar.window(occasion)
    pairs = log.drop_duplicates(["user_id", "item_id", "day"])
    recent = pairs[(pairs["day"] >= first - BEFORE) & (pairs["day"] < first)]
    popularity = recent.groupby("item_id")["user_id"].nunique().astype(float)
    bought = pairs[(pairs["day"] >= first) & (pairs["day"] <= last)][["user_id", "item_id"]].drop_duplicates()
    earlier = pairs[pairs["day"] < first][["user_id", "item_id"]].drop_duplicates()
    new = bought.merge(earlier, how="left", indicator=True)
    new = new[new["_merge"] == "left_only"][["user_id", "item_id"]]
    table = scores.set_index("category").assign(lift=lambda frame: np.log(frame["lift"]))[list(MODELS)]
    z = (table - table.mean()) / table.std(ddof=0)
    of_items = z.reindex(categories.reindex(popularity.index)).fillna(0.0).set_axis(popularity.index)
    return Week(name, popularity, {"all": bought, "new": new}, of_items)


def read_weeks(run: FinishedRun, calendar: Calendar) -> list[Week]:
    """The weeks of the occasions that the study scored, by date."""
    scores = pq.read_table(run.path("occasions", "scores")).to_pandas()
    items = pq.read_table(run.path("validate", "items"), columns=["item_id", "category"]).to_pandas()
    paths = items["category"].map(lambda path: " > ".join(path[: calendar.level]))
    categories = pd.Series(paths.to_numpy(), index=items["item_id"])
    log = pq.read_table(run.path("validate", "events"), columns=["user_id", "item_id", "ts"]).to_pandas()
    log["day"] = log["ts"].dt.tz_convert(calendar.zone).dt.date
    known = set(scores["occasion"])
    names = [occasion.name for occasion in calendar.occasions if occasion.name in known]
    return [make_week(name, scores[scores["occasion"] == name], log, categories, calendar) for name in names]


def main() -> None:
    """Measure, print, and write the JSON file."""
    arguments = parse_run(__doc__).parse_args()
    settings = get_settings()
    config, run = find_run(arguments, settings)
    calendar = load_document(settings.configs_dir / "occasions" / f"{config.name}.yaml", Calendar)
    weeks = read_weeks(run, calendar)
    figures = {kind: measure(weeks, kind, config.seed) for kind in KINDS}
    print(json.dumps(figures, indent=2))
    write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()
