"""Occasions of a year and what was bought for them: the lift of each category (configs/occasions/*.yaml).

With n the events of a category in an occasion's window, N all events in the window, and p the category's share of the
events on ordinary days,

    lift = (n + 10) / (p N + 10)

so that a handful of events makes no lift. Ordinary days lie in no window.
"""

import itertools
import re
from datetime import date, datetime, timedelta
from pathlib import Path
from typing import Self
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow.parquet as pq
from pydantic import Field, field_validator, model_validator

from components.config import Model

SMOOTHING = 10.0  # events
NEARBY = timedelta(days=28)  # on both sides of an occasion
CategoryPath = tuple[str, ...]  # top → leaf
Floats = npt.NDArray[np.float64]
_SLOT = re.compile(r"\{(\w+)\}")
_COMMON = frozenset({"day", "eve", "the", "and", "for"})  # words of names that say nothing


class Occasion(Model):
    """A day of the year that people shop for."""

    name: str = Field(min_length=1, description="As prompts say it.")
    day: date
    other_names: tuple[str, ...] = ()

    def shares_word(self, path: CategoryPath) -> bool:
        """Whether a category path has a word of the occasion's names; plural and possessive forms count as the word."""
        return not _words(self.name, *self.other_names).isdisjoint(_words(*path))


class Calendar(Model):
    """Content of a file in configs/occasions."""

    zone: str = Field(description="Time zone of the shops.")
    level: int = Field(gt=0, description="Levels of a category path that make a category, from the top.")
    window_days: int = Field(gt=0, description="Days of a window; the last is the occasion's.")
    ordinary: str = Field(min_length=1, description="Said in the place of the occasion, as the comparison.")
    occasions: tuple[Occasion, ...] = Field(min_length=2)
    templates: tuple[str, ...] = Field(min_length=1)

    @field_validator("templates")
    @classmethod
    def _slots(cls, templates: tuple[str, ...]) -> tuple[str, ...]:
        for template in templates:
            if sorted(_SLOT.findall(template)) != ["category", "occasion"] or not _SLOT.fullmatch(template.split()[-1]):
                raise ValueError(f"expected {{category}} and {{occasion}}, one of them the last word, but {template!r}")
        return templates

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for before, after in itertools.pairwise(self.occasions):
            if after.day <= before.day:
                raise ValueError(f"expected occasions by date, but {after.name!r} follows {before.name!r}")
        return self

    def local_day(self, instant: datetime) -> date:
        """Day of an instant where the shops are."""
        return instant.astimezone(ZoneInfo(self.zone)).date()

    def window(self, occasion: Occasion) -> tuple[date, date]:
        """First and last day of an occasion's window."""
        return occasion.day - timedelta(days=self.window_days - 1), occasion.day

    def halves(self, test_start: date) -> tuple[tuple[Occasion, ...], tuple[Occasion, ...]]:
        """Occasions for the choice of a method, and those that are scored with it.

        Every other one by date, from the first, serves the choice, unless its window reaches into the test split.
        """
        chosen = tuple(occasion for occasion in self.occasions[::2] if occasion.day < test_start)
        return chosen, tuple(occasion for occasion in self.occasions if occasion not in chosen)


def count_events(events: Path, items: Path, calendar: Calendar) -> pd.DataFrame:
    """Events by local day (index) and category path (columns, tuples).

    Paths are cut at the calendar's level; items with a shorter one are left out.
    """
    paths = pq.read_table(items, columns=["item_id", "category"]).to_pandas()
    paths = paths[paths["category"].map(len) >= calendar.level]
    log = pq.read_table(events, columns=["item_id", "ts"]).to_pandas()
    log["day"] = log["ts"].dt.tz_convert(calendar.zone).dt.date
    codes, names = pd.factorize(paths["category"].map(lambda path: tuple(path[: calendar.level])))
    numbers = pd.Series(codes, index=paths["item_id"])
    log = log[log["item_id"].isin(numbers.index)]
    counts: pd.DataFrame = log.groupby(["day", log["item_id"].map(numbers)]).size().unstack(fill_value=0)
    counts.columns = pd.Index([names[code] for code in counts.columns], tupleize_cols=False)
    return counts


def measure_lifts(counts: pd.DataFrame, calendar: Calendar, until: date, *, nearby: bool = False) -> Floats:
    """Lift of each category for each occasion, [occasions, categories]; `counts` as from `count_events`.

    Ordinary days end before `until`. With `nearby` they are those within four weeks of the occasion, so that a season
    makes no lift.
    """
    days = np.array(counts.index.to_list(), dtype="datetime64[D]")
    events = counts.to_numpy(dtype=np.float64)
    windows = [_between(days, *calendar.window(occasion)) for occasion in calendar.occasions]
    ordinary = ~np.any(windows, axis=0) & (days < np.datetime64(until))
    lifts = []
    for occasion, window in zip(calendar.occasions, windows, strict=True):
        near = _between(days, occasion.day - NEARBY, occasion.day + NEARBY) if nearby else True
        usual = events[ordinary & near].sum(axis=0)
        expected = usual / usual.sum() * events[window].sum()
        lifts.append((events[window].sum(axis=0) + SMOOTHING) / (expected + SMOOTHING))
    return np.array(lifts)


def _between(days: npt.NDArray[np.datetime64], first: date, last: date) -> npt.NDArray[np.bool_]:
    inside: npt.NDArray[np.bool_] = (days >= np.datetime64(first)) & (days <= np.datetime64(last))
    return inside


def _words(*texts: str) -> set[str]:
    found = re.findall(r"[a-z]+", " ".join(texts).lower().replace("'s", ""))
    return {word.removesuffix("s") for word in found if len(word) > 2} - _COMMON
