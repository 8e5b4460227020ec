"""Load of one kind on the recall API, in a process of its own: `read` users' recall, or `write` events.

Open loop: requests are due at times drawn beforehand (Poisson), whatever became of the earlier ones, and a latency
counts from the time a request was due. So a server that stalls is charged for every request that it kept waiting, and
so is a client that is late itself; `late_ms` tells how late it was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import uvloop

from benchmarks.serving.client import Pool, get, post

CONNECTIONS = 64  # to each API process
# How often a read asks for an event that is followed to its result, at first and by the time waited: the resolution of
# event→visible. Every tenth of a second, events that wait half a minute would ask as many reads again as are measured.
POLL_SECONDS, POLL_SHARE = 0.1, 0.05
_PERCENTILES = {"p50": 50, "p95": 95, "p99": 99, "p99_9": 99.9, "max": 100}

Floats = npt.NDArray[np.float64]


def percentiles(values: list[float]) -> dict[str, float] | None:
    """The usual percentiles, none of nothing."""
    if not values:
        return None
    return {name: round(float(np.percentile(values, share)), 3) for name, share in _PERCENTILES.items()}


def arrivals(rate: float, seconds: float, random: np.random.Generator) -> Floats:
    """Times of a Poisson process, seconds from its start."""
    return np.sort(random.uniform(0, seconds, random.poisson(rate * seconds)))


def skewed(count: int, exponent: float) -> Floats:
    """Probabilities that fall with the rank to the power of the exponent (Zipf); 0 makes them equal."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


class Tally:
    """What became of the requests."""

    def __init__(self) -> None:
        self.latency_ms: list[float] = []
        self.late_ms: list[float] = []
        self.outcomes: Counter[str] = Counter()

    def summary(self) -> dict[str, Any]:
        """Percentiles and counts; tenths are of the requests, in the order in which they ended."""
        tenths = [part for part in np.array_split(np.array(self.latency_ms), 10) if len(part)]
        return {
            "requests": sum(self.outcomes.values()),
            "outcomes": dict(self.outcomes),
            "latency_ms": percentiles(self.latency_ms),
            "latency_ms_p99_by_tenth": [round(float(np.percentile(part, 99)), 3) for part in tenths],
            "late_ms": percentiles(self.late_ms),
        }


async def offer(due: Floats, act: Callable[[int], Awaitable[str]], tally: Tally, start_at: float = 0.0) -> None:
    """Start request number n at its time, wait for none, and return when all have ended.

    Args:
        due: Seconds from the start, ascending.
        act: Makes the request of that number and names its outcome.
        tally: Takes down what became of it.
        start_at: Seconds since 1970; now, if that has passed.
    """
    loop = asyncio.get_running_loop()
    start = loop.time() + max(0.0, start_at - time.time())

    async def one(number: int, at: float) -> None:
        tally.late_ms.append(1000 * (loop.time() - at))
        try:
            outcome = await act(number)
        except (OSError, TimeoutError) as error:
            outcome = type(error).__name__
        tally.latency_ms.append(1000 * (loop.time() - at))
        tally.outcomes[outcome] += 1

    async with asyncio.TaskGroup() as tasks:
        for number, at in enumerate(start + due):
            if (wait := at - loop.time()) > 0:
                await asyncio.sleep(wait)
            tasks.create_task(one(number, at))


async def read(options: argparse.Namespace, population: dict[str, Any]) -> dict[str, Any]:
    """Read recall of users for tasks, both drawn at random."""
    random = np.random.default_rng(options.seed)
    due = arrivals(options.rate, options.seconds, random)
    users = random.choice(population["users"], len(due), p=skewed(len(population["users"]), options.skew))
    tasks = random.choice(population["tasks"], len(due))
    tally = Tally()
    async with Pool(options.host, options.port, CONNECTIONS) as pool:

        async def act(number: int) -> str:
            status, body = await pool.ask(get(f"/v1/users/{users[number]}/recall?task={tasks[number]}&k=20"))
            if status != 200:
                return str(status)
            return "fallback" if b'"source":"fallback"' in body else "model"

        await offer(due, act, tally, options.start_at)
    return tally.summary()


async def write(options: argparse.Namespace, population: dict[str, Any]) -> dict[str, Any]:
    """Post events one by one, and follow some of them until a read shows a result that knows them.

    Those of the hot user, the population's least frequent one, come on top and are not followed.
    """
    random = np.random.default_rng(options.seed)
    due = arrivals(options.rate, options.seconds, random)
    users = random.choice(population["users"], len(due), p=skewed(len(population["users"]), options.skew))
    items = random.choice(len(population["items"]), len(due), p=skewed(len(population["items"]), 1.0))
    followed = set(np.linspace(0, len(due) - 1, int(options.seconds * options.followed_rate)).astype(int).tolist())
    hot_due = arrivals(options.hot_rate, options.seconds, random)
    tally, hot = Tally(), Tally()
    visible: list[float] = []
    unseen: list[float] = []
    async with Pool(options.host, options.port, CONNECTIONS) as pool:
        following: list[asyncio.Task[None]] = []

        async def follow(user: str, event_id: str, ts: datetime) -> None:
            loop = asyncio.get_running_loop()
            accepted = loop.time()
            while (age := loop.time() - accepted) < options.follow_seconds:
                status, body = await pool.ask(get(f"/v1/users/{user}/recall?k=1&task={population['tasks'][0]}"))
                if status == 200 and _knows(json.loads(body), event_id, ts):
                    visible.append(loop.time() - accepted)
                    return
                await asyncio.sleep(max(POLL_SECONDS, POLL_SHARE * age))
            unseen.append(age)

        async def send(user: str, item: int, follows: bool) -> str:
            event_id, ts = str(uuid.uuid4()), datetime.now(UTC)
            about = {"item_id": population["items"][item], "query": population["queries"][item]}
            event = {"event_id": event_id, "user_id": user, **about, "ts": ts.isoformat()}
            status, _ = await pool.ask(post("/v1/events", json.dumps(event).encode()))
            if status == 202 and follows:
                following.append(asyncio.create_task(follow(user, event_id, ts)))
            return str(status)

        def act(number: int) -> Awaitable[str]:
            return send(str(users[number]), int(items[number]), number in followed)

        def act_hot(number: int) -> Awaitable[str]:
            return send(str(population["users"][-1]), number % len(population["items"]), False)

        async with asyncio.TaskGroup() as loads:
            loads.create_task(offer(due, act, tally, options.start_at))
            loads.create_task(offer(hot_due, act_hot, hot, options.start_at))
        ended = await asyncio.gather(*following, return_exceptions=True)
    lost = sum(isinstance(one, BaseException) for one in ended)
    return {**tally.summary(), "visible_seconds": percentiles(visible), "followed": len(visible), "unseen": unseen,
            "lost_while_following": lost, "hot_user": hot.summary() if options.hot_rate else None}  # fmt: skip


def _knows(answer: dict[str, Any], event_id: str, ts: datetime) -> bool:
    """Whether a result was computed from a history with the event, or with a later one of the same user."""
    if answer["source"] != "model":
        return False
    return answer["event_id"] == event_id or datetime.fromisoformat(answer["event_ts"]) > ts


def main() -> None:
    """Offer the load, then write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["read", "write"])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, nargs="+", required=True, help="Of each API process; they take turns")
    parser.add_argument("--population", type=Path, required=True, help="JSON, as phases.py writes it")
    parser.add_argument("--rate", type=float, required=True, help="Requests a second")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--start-at", type=float, default=0.0, help="Seconds since 1970, so that clients start at once")
    parser.add_argument("--skew", type=float, default=1.0, help="Of the users; 0: all alike")
    parser.add_argument("--hot-rate", type=float, default=0.0, help="Events a second of one more user, beside the rate")
    parser.add_argument("--followed-rate", type=float, default=2.0, help="Events a second followed to their result")
    parser.add_argument("--follow-seconds", type=float, default=120.0, help="Longest")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    options = parser.parse_args()
    act = read if options.kind == "read" else write
    population = json.loads(options.population.read_text())
    options.output.write_text(json.dumps(uvloop.run(act(options, population))))


if __name__ == "__main__":
    main()
