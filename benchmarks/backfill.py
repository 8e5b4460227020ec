"""The back-fill: users per second and memory, and what it takes from live events on the same core.

    python -m benchmarks.backfill --config complete_journey --run-dir default --core 0 --output backfill.json

needs the stages features and release of the run. One worker and the back-fill share a core, if one is named; Redis and
API run elsewhere. Live events come at --load times the worker's own speed, with a query in each.

    live           seconds from feeding an event to its result, without the back-fill and beside it
    users_per_second   of the back-fill, alone and beside the live events; who has results already is not counted
    peak_mib       the most memory of the back-fill (PSS), its start included
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from benchmarks.bench import config_options, find_run, parse_run, write_figures
from benchmarks.instances import MostMemory, Point
from benchmarks.serving.services import Cores, Runtime
from components.config import RunConfig
from components.recall.state.backfill import ShardProgress, read_shard
from components.release.bundle import read_manifest
from components.release.publication import SERVING, read_publication
from components.settings import Settings, get_settings
from components.studies.finished import FinishedRun

LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class Place:
    """A runtime that serves a release, and its users.

    Attributes:
        runtime: With one worker.
        point: Sends the live events.
        options: `--config` and `--set`.
        order: Of the publication.
    """

    runtime: Runtime
    point: Point
    options: list[str]
    order: int

    def progress(self) -> ShardProgress:
        """How far the back-fill is."""
        return read_shard(self.runtime.client, self.order, 0, 1) or ShardProgress(release="")

    def start(self) -> psutil.Process:
        """Start the back-fill beside the worker."""
        command = (sys.executable, "-m", "components", "recall", "backfill", *self.options)
        started = self.runtime.start("backfill", command, self.runtime.cores.workers)
        return psutil.Process(started.pid)

    def wait(self, done: int = 0) -> tuple[float, ShardProgress]:
        """When it had finished more users than `done`, or all of them, and how far it was."""
        while (found := self.progress()).done <= done and not found.finished:
            if (code := self.runtime.processes["backfill"].poll()) not in (None, 0):
                raise SystemExit(f"back-fill: expected success, got exit code {code}; see {self.runtime.folder}.")
            time.sleep(LOOK_SECONDS)
        return time.monotonic(), found


@contextmanager
def serve(config: RunConfig, run: FinishedRun, options: list[str], core: str, settings: Settings) -> Iterator[Place]:
    """A runtime without results of any user."""
    table = pq.read_table(run.path("features", "contexts"), filters=[("split", "=", "test")])
    items = pq.read_table(run.path("features", "catalogue"))["item_id"].to_numpy()
    with (
        tempfile.TemporaryDirectory() as folder,
        Runtime(settings, options, 1, 1, 1, Cores(workers=core), Path(folder)) as runtime,
    ):
        bundle = run.path("release", "bundle")
        runtime.publish(read_manifest(bundle).release, str(bundle))
        publication = read_publication(runtime.client, SERVING)
        assert publication is not None
        users = sorted(set(table["user_id"].to_pylist()))
        yield Place(runtime, Point(config, runtime.client, users, items), options, publication.order)


def measure_apart(place: Place, arguments: argparse.Namespace) -> dict[str, Any]:
    """Live events without the back-fill, then the back-fill without live events."""
    place.point.burst(arguments.users)  # warms the worker
    speed = float(np.median([place.point.burst(arguments.users) for _ in range(arguments.repeats)]))
    waits = place.point.pace(speed * arguments.load, arguments.seconds)
    with MostMemory(place.start()) as most:
        since, before = place.wait()
        until, after = place.wait(before.total)
    return {
        "worker_users_per_second": speed,
        "live": describe_waits(waits),
        "users": after.total,
        "computed": after.stored,
        "users_per_second": (after.stored - before.stored) / (until - since),
        "peak_mib": most.found / 2**20,
    }


def measure_together(place: Place, speed: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both at once; `speed` is that of the worker alone, in users per second."""
    place.point.burst(arguments.users)
    place.start()
    since, before = place.wait()
    waits = place.point.pace(speed * arguments.load, arguments.seconds)
    seconds, after = time.monotonic() - since, place.progress()
    return {
        "live": describe_waits(waits),
        "users_per_second": (after.stored - before.stored) / seconds,
        "finished_meanwhile": after.finished,
    }


def describe_waits(waits: list[float]) -> dict[str, float]:
    """Seconds to a result."""
    return {"events": len(waits), "p50": float(np.quantile(waits, 0.5)), "p99": float(np.quantile(waits, 0.99))}


def main() -> None:
    """Measure, print, and write the JSON file."""
    parser = parse_run(__doc__)
    parser.add_argument("--core", default="", help="Core of worker and back-fill; empty: any")
    parser.add_argument("--users", type=int, default=256, help="Of a burst that measures the worker's speed")
    parser.add_argument("--repeats", type=int, default=3, help="Such bursts")
    parser.add_argument("--load", type=float, default=0.3, help="Share of that speed at which live events come")
    parser.add_argument("--seconds", type=float, default=30.0, help="For how long")
    arguments = parser.parse_args()
    settings = get_settings()
    config, run = find_run(arguments, settings)
    where = (config, run, config_options(arguments), arguments.core, settings)
    with serve(*where) as place:
        figures: dict[str, Any] = {"load": arguments.load, "apart": measure_apart(place, arguments)}
    with serve(*where) as place:
        figures["together"] = measure_together(place, figures["apart"]["worker_users_per_second"], arguments)
    print(json.dumps(figures, indent=2))
    write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()
