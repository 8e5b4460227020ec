"""Several instances in one container: throughput, latency and memory by their number and their threads.

    python -m benchmarks.instances --config complete_journey --run-dir default --output instances.json

needs the stages features and release of the run. Every point starts the runtime of `benchmarks.serving` anew and
measures the whole path from the stream to stored results, with a query in every event, so that all tasks are asked:

    users_per_second   a burst of one event a user, until the last result is there
    p50, p99           seconds from feeding an event to its result, at --load times that speed
    memory             MiB of the supervisor and its instances (PSS: shared pages count once), once all have served
    added              of each further instance, and as a share of the first
    gpu_memory         in use on the GPU by all processes then, as nvidia-smi says

Seconds to a result end when it is computed; storing it adds milliseconds. `--mps` lets the instances share the GPU
through NVIDIA MPS, which runs kernels of several processes at the same time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow.parquet as pq
import redis

from benchmarks.bench import QUERY, config_options, find_run, parse_run, query_gpu, write_figures
from benchmarks.serving.services import Cores, Runtime
from components.config import RunConfig
from components.local.processes import tree_memory_bytes
from components.recall.operate.intake import feed
from components.recall.state.events import Event
from components.recall.state.scripts import STREAM
from components.recall.state.store import UserStore
from components.release.bundle import read_manifest
from components.settings import Settings, get_settings
from components.studies.finished import FinishedRun

_MIB = 2**20
MPS = "nvidia-cuda-mps-control"
REST_SECONDS, LOOK_SECONDS = 3.0, 0.25


def measure(
    config: RunConfig, run: FinishedRun, arguments: argparse.Namespace, settings: Settings
) -> list[dict[str, Any]]:
    """One row a number of instances and of threads."""
    table = pq.read_table(run.path("features", "contexts"), filters=[("split", "=", "test")])
    users = sorted(set(table["user_id"].to_pylist()))
    items = pq.read_table(run.path("features", "catalogue"))["item_id"].to_numpy()
    rows: list[dict[str, Any]] = []
    for threads, instances in itertools.product(arguments.threads, arguments.instances):
        with (
            tempfile.TemporaryDirectory() as folder,
            Runtime(settings, config_options(arguments), 1, instances, threads, Cores(), Path(folder)) as runtime,
        ):
            bundle = run.path("release", "bundle")
            runtime.publish(read_manifest(bundle).release, str(bundle))
            workers = psutil.Process(runtime.processes["recall-workers"].pid)
            point = Point(config, runtime.client, users, items)
            rows.append({"threads": threads, "instances": instances, **point.measure(arguments, workers)})
        first = next(row for row in rows if row["threads"] == threads)
        if instances > first["instances"]:
            for what in ("memory", "peak"):
                alone = first[f"{what}_mib"]
                added = (rows[-1][f"{what}_mib"] - alone) / (instances - first["instances"])
                rows[-1] |= {f"{what}_added_mib": added, f"{what}_added_share": added / alone}
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
        self._random = random.Random(0)  # noqa: S311  # draws users, no secrets
        self._number = itertools.count()

    def measure(self, arguments: argparse.Namespace, process: psutil.Process) -> dict[str, Any]:
        """Speed, latency and memory."""
        self.burst(arguments.users)  # warms every instance
        speeds = [self.burst(arguments.users) for _ in range(arguments.repeats)]
        speed = float(np.median(speeds))
        waits = self.pace(speed * arguments.load, arguments.seconds)
        with MostMemory(process) as most:  # in a burst of its own, for looking takes time
            self.burst(arguments.users)
        time.sleep(REST_SECONDS)
        return {
            "users_per_second": speed,
            "users_per_second_range": [min(speeds), max(speeds)],
            "p50": float(np.quantile(waits, 0.5)),
            "p99": float(np.quantile(waits, 0.99)),
            "memory_mib": tree_memory_bytes(process) / _MIB,
            "peak_mib": most.found / _MIB,
            "gpu_memory": query_gpu("memory.used"),
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
        while self._client.xlen(STREAM):
            time.sleep(0.01)

    def _waited(self, event: Event) -> float:
        result = self._store.result(event.user_id, self._config.tasks[0].name)
        computed = result.computed_at if result is not None else datetime.now(UTC)
        return max(0.0, (computed - event.ts).total_seconds())


class MostMemory:
    """The most memory of a process and its children that is seen meanwhile.

    Attributes:
        found: Bytes.
    """

    def __init__(self, process: psutil.Process) -> None:
        self.found = 0
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while True:
            self.found = max(self.found, tree_memory_bytes(self._process))
            if self._ended.wait(LOOK_SECONDS):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


@contextmanager
def share_gpu() -> Iterator[None]:
    """NVIDIA MPS for the processes that are started meanwhile."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ |= {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        subprocess.run([MPS, "-d"], check=True)
        try:
            yield
        finally:
            subprocess.run([MPS], input=b"quit\n", check=True)


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = parse_run(__doc__)
    parser.add_argument("--instances", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--users", type=int, default=256, help="Of a burst")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--load", type=float, default=0.8, help="Share of the burst's speed at which latency is taken")
    parser.add_argument("--seconds", type=float, default=60.0, help="For how long")
    parser.add_argument("--mps", action="store_true", help=f"Share the GPU through NVIDIA MPS ({MPS})")
    arguments = parser.parse_args()
    settings = get_settings()
    config, run = find_run(arguments, settings)
    with share_gpu() if arguments.mps else nullcontext():
        write_figures(arguments.output, measure(config, run, arguments, settings))


if __name__ == "__main__":
    main()
