"""What a read costs the API's process, by how Python collects garbage: processor time, and pauses of all reads.

    python -m benchmarks.reads --run-dir default --output reads.json

needs the stage release of the run. The application answers in this process, without sockets, 32 reads at once out of a
real Redis; each way of collecting has a process of its own, which imports what the API does and no more.

    usual    as Python does by itself
    frozen   what was imported is left out
    rarely   as `urm recall serve` does: that, and collections only after many objects left behind
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import redis
from fastapi import FastAPI

from components.config import load_named_config
from components.local.processes import HOST, choose_port
from components.local.services import redis_server
from components.memory import collect_rarely
from components.recall.api.app import create_app
from components.recall.state.scripts import result_key
from components.recall.state.store import Result
from components.recall.telemetry.logs import log_as_json
from components.redis_client import open_redis
from components.release.bundle import read_manifest, read_tasks
from components.release.publication import SERVING, Publication
from components.settings import Settings, get_settings

WAYS = ("usual", "frozen", "rarely")
USERS, STORED, AT_ONCE, WARM_UP = 1_500, 100, 32, 1_000


class Pauses:
    """Milliseconds of each full collection."""

    def __init__(self) -> None:
        self.full: list[float] = []
        self._started = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, about: dict[str, int]) -> None:
        if phase == "start":
            self._started = time.perf_counter()
        elif about["generation"] == 2:
            self.full.append(1000 * (time.perf_counter() - self._started))


def store_results(client: redis.Redis, bundle: Path) -> str:
    """Publish the release and store a result of each user; the task that they are of."""
    release, task = read_manifest(bundle).release, read_tasks(bundle)[0].name
    client.set(SERVING, Publication(release=release, bundle=str(bundle), order=1).model_dump_json())
    items = pq.read_table(bundle / "titles.parquet", columns=["item_id"])["item_id"].to_numpy()
    random, now = np.random.default_rng(0), datetime.now(UTC)
    for user in range(USERS):
        found = random.choice(items, min(STORED, len(items)), replace=False).tolist()
        result = Result(item_ids=found, scores=[1.5] * len(found), release=release, event_id="e", event_ts=now,
                        computed_at=now)  # fmt: skip
        client.hset(result_key(str(user), task), "body", result.model_dump_json())
    return task


async def read(app: FastAPI, user: int, task: str) -> None:
    """One read through the whole application; an answer other than 200 is an error."""
    path = f"/v1/users/{user}/recall"
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
             "path": path, "raw_path": path.encode(), "query_string": f"task={task}&k=20".encode(), "headers": [],
             "client": (HOST, 1), "server": (HOST, 80), "root_path": ""}  # fmt: skip
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    if sent[0]["status"] != 200:
        raise RuntimeError(f"{path}: {sent[1]['body'].decode()}")


async def measure(app: FastAPI, task: str, reads: int, repeats: int) -> list[dict[str, float]]:
    """So many reads of random users, again and again."""
    random, pauses = np.random.default_rng(1), Pauses()
    found = []
    for number in (WARM_UP, *[reads] * repeats):
        pauses.full.clear()
        started = time.process_time()
        for _ in range(number // AT_ONCE):
            await asyncio.gather(*(read(app, int(user), task) for user in random.integers(0, USERS, AT_ONCE)))
        elapsed = time.process_time() - started
        found.append({
            "milliseconds_a_read": 1000 * elapsed / (number // AT_ONCE * AT_ONCE), "full_collections": len(pauses.full),
            "collecting_milliseconds": sum(pauses.full), "longest_pause_milliseconds": max(pauses.full, default=0.0),
        })  # fmt: skip
    return found[1:]


def measure_way(arguments: argparse.Namespace, settings: Settings) -> list[dict[str, float]]:
    """Figures of one way, in this process."""
    import uvloop

    config = load_named_config(arguments.config, settings.configs_dir, arguments.set)
    with tempfile.TemporaryDirectory() as folder:
        port = choose_port(taken=set())
        server = subprocess.Popen(
            [redis_server(), "--bind", HOST, "--port", str(port), "--dir", folder, "--save", ""],
            stdout=subprocess.DEVNULL,
        )
        try:
            settings = settings.model_copy(update={"redis_url": f"redis://{HOST}:{port}/0"})
            client = open_redis(settings.redis_url)
            while not _answers(client):
                time.sleep(0.05)
            task = store_results(client, arguments.bundle)
            app = create_app(settings, config.recall)
            log_as_json()
            if arguments.way == "frozen":
                gc.collect()
                gc.freeze()
            elif arguments.way == "rarely":
                collect_rarely()
            return uvloop.run(measure(app, task, arguments.reads, arguments.repeats))
        finally:
            server.kill()
            server.wait()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def main(words: list[str] | None = None) -> None:
    """Measure each way in a process of its own, and write the figures."""
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["one-way"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("--config", required=True)
        parser.add_argument("--set", action="append", default=[])
        parser.add_argument("--bundle", type=Path, required=True)
        parser.add_argument("--way", choices=WAYS, required=True)
        parser.add_argument("--reads", type=int, required=True)
        parser.add_argument("--repeats", type=int, required=True)
        print(json.dumps(measure_way(parser.parse_args(words[1:]), get_settings())))
        return
    from benchmarks.bench import config_options, find_run, parse_run, write_figures  # with torch, which no API has

    parser = parse_run(__doc__)
    parser.add_argument("--reads", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(words)
    _, run = find_run(arguments, get_settings())
    options = [*config_options(arguments), "--bundle", str(run.path("release", "bundle"))]
    options += ["--reads", str(arguments.reads), "--repeats", str(arguments.repeats)]
    figures = {}
    for way in WAYS:
        command = [sys.executable, "-m", "benchmarks.reads", "one-way", "--way", way, *options]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        figures[way] = json.loads(done.stdout.splitlines()[-1])
        print(f"{way}: {json.dumps(figures[way])}", flush=True)
    write_figures(arguments.output, figures)


if __name__ == "__main__":
    main()
