"""Load benchmark of the recall runtime: real Redis, API and worker processes, a real release, real users.

    python -m benchmarks.serving --run-dir default --output serving.json

needs the stages features and release of the run; the registry is left out. Phases, in this order:

capacity  users a second of the workers with a deep backlog of distinct users, first without and then with reads
steady    events at 80 % of the capacity with reads, users drawn by Zipf's law; from the outside: a read's latency
          from the time it was due, and an event's time from its acceptance to the first read that shows it
overload  events at twice the capacity, of some users only, all alike; then the time until the backlog is gone
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.bench import config_options, find_run, parse_run, write_figures
from benchmarks.serving.phases import Bench, Population
from benchmarks.serving.services import Cores, Runtime
from components.exceptions import UserError
from components.release.bundle import read_manifest, read_tasks
from components.settings import Settings, get_settings
from components.studies.finished import FinishedRun

PHASES = ("capacity", "steady", "overload")
STEADY_SHARE, OVERLOAD_FACTOR = 0.8, 2.0


def read_population(run: FinishedRun) -> Population:
    """Users in random order, so that the frequent ones of the load are not special; items by their events."""
    table = pq.read_table(run.path("features", "feature_store") / "user_statistics.parquet", columns=["user_id"])
    users = np.unique(np.asarray(table["user_id"]).astype(str))
    np.random.default_rng(0).shuffle(users)
    items = (
        pq.read_table(run.path("features", "catalogue"))
        .sort_by([("train_events", "descending")])["item_id"]
        .to_pylist()
    )
    bundle = run.path("release", "bundle")
    titles = pq.read_table(bundle / "titles.parquet", partitioning=None)
    words = dict(zip(titles["item_id"].to_pylist(), titles["category"].to_pylist(), strict=True))
    queries = [words[item][-1].lower() if words.get(item) else "anything" for item in items]
    return Population(users.tolist(), items, queries, [task.name for task in read_tasks(bundle)])


def measure(arguments: argparse.Namespace, settings: Settings, folder: Path) -> dict[str, Any]:
    """Run the phases, each printed as soon as it ends."""
    config, run = find_run(arguments, settings)
    population, bundle = read_population(run), run.path("release", "bundle")
    release, options = read_manifest(bundle).release, config_options(arguments)
    cores = Cores(arguments.worker_cores, arguments.service_cores, arguments.client_cores)
    processes = {"apis": arguments.apis, "workers": arguments.workers, "threads": arguments.threads}
    found: dict[str, Any] = {**processes, "cores": vars(cores), "release": release,
                             "tasks": len(population.tasks), "users": len(population.users)}  # fmt: skip
    with Runtime(settings, options, arguments.apis, arguments.workers, arguments.threads, cores, folder) as runtime:
        runtime.publish(release, str(bundle))
        if cores.clients:  # this process asks for the backlog, which takes milliseconds of a core
            pin = ("taskset", "--all-tasks", "--cpu-list", "--pid", cores.clients, str(os.getpid()))
            subprocess.run(pin, check=True, stdout=subprocess.DEVNULL)
        bench = Bench(runtime, population, config.recall, arguments.read_rate)
        for phase in arguments.phases.split(","):
            found[phase] = _run(phase, bench, arguments, found)
            print(f"{phase}: {json.dumps(found[phase], indent=2)}", flush=True)
    return found


def _run(phase: str, bench: Bench, arguments: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    if phase == "capacity":
        settle = arguments.settle_seconds
        alone = bench.capacity(arguments.capacity_seconds, settle, reading=False)
        beside = bench.capacity(arguments.capacity_seconds, settle, reading=True) if arguments.read_rate else None
        return {"alone": alone, "beside_reads": beside}
    measured = found.get("capacity", {})
    capacity = arguments.capacity or (measured["beside_reads"] or measured["alone"])["users_per_second"]
    if phase == "steady":
        rate = STEADY_SHARE * capacity
        return bench.load(phase, rate, arguments.steady_seconds, arguments.skew, None, arguments.hot_rate)
    return bench.load(phase, OVERLOAD_FACTOR * capacity, arguments.overload_seconds, 0.0, arguments.overload_users)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parse_run(__doc__)
    parser.add_argument("--phases", default=",".join(PHASES), help="Some of " + ",".join(PHASES))
    parser.add_argument("--capacity", type=float, default=0.0, help="Users a second, where the phase is left out")
    parser.add_argument("--capacity-seconds", type=float, default=60.0)
    parser.add_argument("--settle-seconds", type=float, default=10.0, help="Of load before the capacity is measured")
    parser.add_argument("--steady-seconds", type=float, default=600.0)
    parser.add_argument("--overload-seconds", type=float, default=300.0)
    parser.add_argument("--overload-users", type=int, default=500)
    parser.add_argument("--skew", type=float, default=1.0, help="Zipf's exponent of the users of the steady load")
    parser.add_argument("--hot-rate", type=float, default=0.0, help="Events a second of one more user, while steady")
    parser.add_argument("--read-rate", type=float, default=1000.0, help="Reads a second; 0 for none")
    parser.add_argument("--apis", type=int, default=1, help="API processes, which the clients ask in turn")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1, help="Of each worker")
    for option in ("--worker-cores", "--service-cores", "--client-cores"):
        parser.add_argument(option, default="", help="As taskset takes it, e.g. 0 or 0-3; empty: any")
    parser.add_argument("--logs", type=Path, help="Keep state and logs in this folder")
    arguments = parser.parse_args(words)
    phases = arguments.phases.split(",")
    if unknown := [phase for phase in phases if phase not in PHASES]:
        parser.error(f"option --phases: expected some of {','.join(PHASES)}, got {unknown[0]!r}")
    for option in ("apis", "workers", "threads"):
        if (number := getattr(arguments, option)) < 1:
            parser.error(f"option --{option}: expected 1 or more, got {number}")
    if not arguments.capacity and "capacity" != phases[0]:
        parser.error("option --capacity: expected a number, since the phase is left out, got none")
    return arguments


def main() -> int:
    """Measure, print, and write the JSON file."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the services are stopped, too
    folder = arguments.logs or Path(tempfile.mkdtemp(prefix="urm-serving-"))
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = measure(arguments, get_settings(), folder)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    write_figures(arguments.output, {"machine_cores": os.cpu_count(), **found})
    if arguments.logs is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
