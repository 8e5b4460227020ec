"""A marketplace's year as Parquet files, of any size, from a seed; a day's events are in memory at a time.

- Users and items are drawn by power laws (ranks in a fixed random order of ids): a user has 20 events on average, an
  item 100, and the busiest user of a hundred million events some 6,000.
- Part of what is drawn is seasonal: which items those are moves through the catalogue with the month, and there is more
  to sell before the end of the year.
- Events come in baskets of one user within some minutes, with four behaviours and three scenarios. Part of a basket are
  the user's own few items, so that histories repeat.

Each day has a random generator of its own, made of the seed and the day.

    python -m benchmarks.large_logs 1e6 large_log
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

START, DAYS = datetime(2025, 1, 1, tzinfo=UTC), 365
EVENTS_PER_USER, EVENTS_PER_ITEM = 20, 100
USER_SKEW, ITEM_SKEW = 0.4, 0.8  # exponents of the power laws
BASKET = 4  # events, on average
OWN_ITEMS, OWN_SHARE, SEASONAL_SHARE = 12, 0.3, 0.2
BEHAVIORS, SHARES = ("view", "cart", "purchase", "favorite"), (0.62, 0.13, 0.2, 0.05)
SCENARIOS = ("search", "home", "campaign")
DEPARTMENTS, AISLES, SHELVES = 20, 15, 10  # of a category path, each in the one before
BRANDS = 2_000
_PRIME = 2_147_483_647  # a rank times this, modulo the number of ids, is its id: larger than any number of ids
_PLACES = 1 << 16
_SECONDS_PER_DAY = 86_400

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LargeLog:
    """A log of about so many events."""

    events: int
    seed: int = 0

    @property
    def num_users(self) -> int:
        """Users with an id; the rarest need not occur."""
        return max(self.events // EVENTS_PER_USER, 1)

    @property
    def num_items(self) -> int:
        """Items with an id; all are in the table of items."""
        return max(self.events // EVENTS_PER_ITEM, 1)

    def write(self, folder: Path) -> None:
        """Write a file per day to the folder `events`, and the file of the items; canonical names, no event_id."""
        (folder / "events").mkdir(parents=True, exist_ok=True)
        for day, size in enumerate(_sizes(self.events)):
            pq.write_table(self.day(day, size), folder / "events" / f"day-{day:03d}.parquet", compression="zstd")
        with pq.ParquetWriter(folder / "items.parquet", next(self.items()).schema, compression="zstd") as writer:
            for part in self.items():
                writer.write_table(part)

    def day(self, day: int, size: int) -> pa.Table:
        """The events of one day, by time."""
        rng = np.random.default_rng([self.seed, day])
        baskets = math.ceil(size / BASKET)
        users = _to_ids(_draw(rng, self.num_users, USER_SKEW, baskets), self.num_users)
        begin = np.sort(rng.integers(0, _SECONDS_PER_DAY * 1_000_000, baskets))
        basket = np.sort(rng.integers(0, baskets, size))
        microseconds = begin[basket] + rng.integers(0, 600_000_000, size)
        order = np.argsort(microseconds, kind="stable")
        user, ts = users[basket][order], np.minimum(microseconds, _SECONDS_PER_DAY * 1_000_000 - 1)[order]
        behavior = rng.choice(len(BEHAVIORS), size, p=SHARES)
        midnight = round((START + timedelta(days=day)).timestamp() * 1e6)
        return pa.table(
            {
                "user_id": pc.binary_join_element_wise("u", pa.array(user).cast(pa.string()), ""),
                "item_id": pa.array(self._items_of(rng, user, day)),
                "behavior": pa.array(np.array(BEHAVIORS)[behavior]),
                "scenario": pa.array(np.array(SCENARIOS)[rng.integers(0, len(SCENARIOS), size)]),
                "ts": pa.array(midnight + ts).cast(pa.timestamp("us", tz="UTC")),
            }
        )

    def items(self) -> Iterator[pa.Table]:
        """The items with title, category and brand, in parts."""
        step = 100_000
        for first in range(0, self.num_items, step):
            ids = np.arange(first, min(first + step, self.num_items))
            rng = np.random.default_rng([self.seed, DAYS, first])
            top, middle, leaf = (rng.integers(0, size, len(ids)) for size in (DEPARTMENTS, AISLES, SHELVES))
            paths = [
                [f"department {a}", f"aisle {a}.{b}", f"shelf {a}.{b}.{c}"]
                for a, b, c in zip(top, middle, leaf, strict=True)
            ]
            yield pa.table(
                {
                    "item_id": pa.array(ids),
                    "title": pa.array([f"article {id_} of {path[-1]}" for id_, path in zip(ids, paths, strict=True)]),
                    "category": pa.array(paths),
                    "brand": pa.array([f"brand {number}" for number in rng.integers(0, BRANDS, len(ids))]),
                }
            )

    def _items_of(self, rng: np.random.Generator, user: Ints, day: int) -> Ints:
        size, number = len(user), self.num_items
        ranks = _draw(rng, number, ITEM_SKEW, size)
        seasonal = rng.random(size) < SEASONAL_SHARE
        ranks = np.where(seasonal, (ranks + number * (day * 12 // DAYS) // 12) % number, ranks)
        # An own item is made of the user and a small number: the same few every day.
        places = np.random.default_rng(self.seed).random(_PLACES)
        own = places[(user * 31 + rng.integers(0, OWN_ITEMS, size)) % _PLACES]
        ranks = np.where(rng.random(size) < OWN_SHARE, _ranks(own, number, ITEM_SKEW), ranks)
        return _to_ids(ranks, number)


def _sizes(events: int) -> Ints:
    """Events of each day: more on Saturdays and towards the end of the year, so many in all."""
    days = np.arange(DAYS)
    weights = (1 + 0.3 * ((START.weekday() + days) % 7 == 5)) * (1 + 0.5 * np.exp(-(DAYS - days) / 30))
    bounds = np.round(np.cumsum(weights) / weights.sum() * events).astype(np.int64)
    return np.diff(bounds, prepend=0)


def _draw(rng: np.random.Generator, number: int, skew: float, size: int) -> Ints:
    return _ranks(rng.random(size), number, skew)


def _ranks(uniform: npt.NDArray[np.float64], number: int, skew: float) -> Ints:
    """Ranks from 0 by a power law: the inverse of its continuous distribution, which needs no table of ranks."""
    power = 1 - skew
    places = ((1 + (number**power - 1) * uniform) ** (1 / power)).astype(np.int64) - 1
    return np.clip(places, 0, number - 1)


def _to_ids(ranks: Ints, number: int) -> Ints:
    return ranks * _PRIME % number


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("events", type=lambda text: int(float(text)))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    LargeLog(given.events, given.seed).write(given.folder)
