"""The recall runtime as an operator runs it, on free ports, with a state of its own: Redis, API, workers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self

import httpx
import psutil
import redis
from prometheus_client.parser import text_string_to_metric_families

from components.deploy.target import roll_out
from components.deploy.workers import WorkerFlip
from components.exceptions import UnavailableError
from components.local.processes import HOST, choose_port
from components.local.services import redis_server
from components.redis_client import open_redis
from components.release.publication import live_workers
from components.settings import Settings

START_SECONDS, ROLL_OUT_SECONDS, STOP_SECONDS = 300.0, 300.0, 30.0
REPOSITORY = Path(__file__).parents[2]
Counts = Counter[str]  # metric with its labels → value


@dataclass
class Cores:
    """Which cores what may run on, as taskset takes it; empty for any."""

    workers: str = ""
    services: str = ""
    clients: str = ""


@dataclass
class Runtime:
    """Redis, API processes and workers; a context manager that starts and stops them.

    Attributes:
        settings: Where configurations and Feast definitions lie.
        options: `--config` and `--set` of API and workers.
        apis: API processes, each on a port of its own, as replicas behind a balancer are.
        workers: Worker processes.
        threads: Of each.
        cores: Which cores what may run on.
        folder: State and logs.
    """

    settings: Settings
    options: Sequence[str]
    apis: int
    workers: int
    threads: int
    cores: Cores
    folder: Path
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __enter__(self) -> Self:
        taken: set[int] = set()
        self.redis_port, *self.ports = (choose_port(taken=taken) for _ in range(1 + self.apis))
        # One port for the supervisor and one after it for each instance.
        self.workers_port = next(p for p in iter(lambda: choose_port(taken=taken), 0) if p < 65_000 - self.workers)
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    @property
    def client(self) -> redis.Redis:
        """A client of the runtime's Redis."""
        return open_redis(self._redis_url)

    @property
    def _redis_url(self) -> str:
        return f"redis://{HOST}:{self.redis_port}/0"

    def start(self, name: str, command: Sequence[str], cores: str, threads: int = 1) -> subprocess.Popen[bytes]:
        """Start a process on some cores, its output in a log of its own."""
        pinned = ["taskset", "-c", cores, *command] if cores else list(command)
        environment = {
            **os.environ,
            "URM_HOME": str(self.folder / "home"),
            "URM_CONFIGS_DIR": str(self.settings.configs_dir.absolute()),
            "URM_FEATURE_REPO_DIR": str(self.settings.feature_repo_dir.absolute()),
            "URM_REDIS_URL": self._redis_url,
            "URM_NUM_THREADS": str(threads),
            "OMP_NUM_THREADS": str(threads),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(pinned, stdout=log, stderr=log, env=environment, cwd=REPOSITORY)
        self.processes[name] = process
        return process

    def publish(self, release: str, bundle: str) -> None:
        """Let the workers serve a release, without the registry."""
        roll_out(WorkerFlip(self.client), release, bundle, ROLL_OUT_SECONDS)
        self._await_apis("readyz")

    def read_metrics(self) -> Counts:
        """The workers' metrics, summed over the instances."""
        counts: Counts = Counter()
        for number in range(self.workers):
            page = httpx.get(f"http://{HOST}:{self.workers_port + 1 + number}/metrics").text
            for family in text_string_to_metric_families(page):
                for sample in family.samples:
                    labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
                    counts[f"{sample.name}{{{labels}}}" if labels else sample.name] += sample.value
        return counts

    def cpu_seconds(self) -> Counter[str]:
        """Processor time of each process with its children, so far."""
        seconds: Counter[str] = Counter()
        for name, process in self.processes.items():
            if process.poll() is None:
                root = psutil.Process(process.pid)
                for one in [root, *root.children(recursive=True)]:
                    times = one.cpu_times()
                    seconds[name] += times.user + times.system
        return seconds

    def _start(self) -> None:
        folder = self.folder / "redis"
        folder.mkdir(parents=True)
        # As `urm up` runs it: an append-only file, synchronised every second.
        state = ("--dir", str(folder), "--appendonly", "yes", "--save", "")
        self.start("redis", (redis_server(), "--bind", HOST, "--port", str(self.redis_port), *state),
                   self.cores.services)  # fmt: skip
        self._await("redis", lambda: bool(self.client.ping()))
        urm = (sys.executable, "-m", "components", "recall")
        for name, port in self._api_ports().items():
            self.start(name, (*urm, "serve", "--port", str(port), *self.options), self.cores.services)
        several = ("workers", "--instances", str(self.workers), "--port", str(self.workers_port),
                   "--stuck-seconds", str(START_SECONDS))  # fmt: skip
        self.start("recall-workers", (*urm, *several, *self.options), self.cores.workers, self.threads)
        self._await_apis("healthz")
        self._await("recall-workers", lambda: len(live_workers(self.client)) == self.workers)

    def _api_ports(self) -> dict[str, int]:
        return {f"recall-api-{number}": port for number, port in enumerate(self.ports)}

    def _await_apis(self, probe: str) -> None:
        for name, port in self._api_ports().items():
            self._await(name, partial(_succeeds, f"http://{HOST}:{port}/{probe}"))

    def _await(self, name: str, is_ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                if is_ready():
                    return
            except (httpx.HTTPError, redis.RedisError):
                pass
            if time.monotonic() > deadline or self.processes[name].poll() is not None:
                raise UnavailableError(
                    name, expected="a process that gets ready", got="none", remedy=f"see {self.folder / name}.log"
                )
            time.sleep(0.2)


def _succeeds(url: str) -> bool:
    return httpx.get(url).is_success
