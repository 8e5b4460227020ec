"""The phases of the load benchmark: capacity, steady load at a share of it, overload and recovery."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import structlog

from benchmarks.serving.services import Runtime
from components.config import RecallConfig
from components.recall.operate.intake import feed
from components.recall.state.events import Event
from components.recall.state.scripts import STREAM, waiting_key

log = structlog.get_logger()
DEPTH_A_WORKER = 8  # batches of distinct users kept waiting while the capacity is measured
SAMPLE_SECONDS = 2.0
DRAIN_SECONDS = 600.0
CLIENT_START_SECONDS = 5.0  # in which the clients' processes get ready
_VISIBLE = "urm_event_to_visible_seconds_bucket{le=%s}"


@dataclass(frozen=True)
class Population:
    """Whom and what the load is about; most frequent first.

    Attributes:
        users: Ids, of the features.
        items: Ids, of the catalogue.
        queries: Words for each item, said with the event, so that the tasks that need words are answered, too.
        tasks: Names.
    """

    users: list[str]
    items: list[int]
    queries: list[str]
    tasks: list[str]

    def write(self, path: Path, num_users: int | None = None) -> Path:
        """Leave it for the clients, cut to so many users."""
        path.write_text(json.dumps({**asdict(self), "users": self.users[:num_users]}))
        return path


@dataclass
class Backlog:
    """The backlog every two seconds: entries of the stream, and users who wait."""

    entries: list[int] = field(default_factory=list)
    users: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Means over fifths of the time, and the greatest."""
        return {name: {"max": max(values, default=0), "mean_by_fifth": [round(float(part.mean()), 1) for part in
                np.array_split(np.array(values), 5) if len(part)]} for name, values in
                (("entries", self.entries), ("users", self.users))}  # fmt: skip


class Bench:
    """A runtime under load."""

    def __init__(self, runtime: Runtime, population: Population, config: RecallConfig, read_rate: float) -> None:
        self._runtime = runtime
        self._population = population
        self._config = config
        self._read_rate = read_rate
        self._client = runtime.client

    def capacity(self, seconds: float, settle: float, reading: bool) -> dict[str, Any]:
        """Users a second, with a backlog of distinct users, each with one event.

        Args:
            seconds: How long it is measured.
            settle: Seconds of load before that.
            reading: Whether reads are asked meanwhile.
        """
        users = itertools.cycle(self._population.users)
        depth = min(DEPTH_A_WORKER * self._config.batch_size * self._runtime.workers, len(self._population.users) // 2)
        seen: list[tuple[float, float]] = []
        reader = self._start_reader("capacity", settle + seconds) if reading else None
        started = time.monotonic()
        with self._cpu() as cpu:
            while (now := time.monotonic() - started) < settle + seconds:
                if self._client.xlen(STREAM) < depth:
                    self._feed(itertools.islice(users, depth))
                count = self._runtime.read_metrics()["urm_worker_user_inferences_total"]
                if now > settle and (not seen or count > seen[-1][1]):
                    seen.append((now, count))  # between two changes lie whole batches
                time.sleep(0.1)
        reads = self._finish(reader) if reader else None
        self._drain()
        if len(seen) < 2:
            raise RuntimeError(f"capacity: no two batches ended within {seconds:g} s; give more --capacity-seconds")
        (first, before), (last, after) = seen[0], seen[-1]
        rate = (after - before) / (last - first)
        return {"users_per_second": rate, "seconds": last - first, "users": after - before, "reads": reads, **cpu}

    def load(
        self, name: str, rate: float, seconds: float, skew: float, num_users: int | None, hot_rate: float = 0.0
    ) -> dict[str, Any]:
        """Events at a rate for a time, with reads, and the time until the backlog is gone afterwards.

        Args:
            name: Of the phase.
            rate: Events per second.
            seconds: How long.
            skew: Zipf's exponent of the users.
            num_users: The most frequent so many; all if None.
            hot_rate: Events per second of one more user.
        """
        backlog = Backlog()
        users = self._population.users[:num_users]
        population = self._population.write(self._runtime.folder / f"{name}-population.json", num_users)
        before = self._runtime.read_metrics()
        stop = threading.Event()
        sampler = threading.Thread(target=self._sample, args=(backlog, users, stop))
        start_at = time.time() + CLIENT_START_SECONDS
        together = ("--start-at", str(start_at))
        reader = self._start_reader(name, seconds, *together) if self._read_rate else None
        follow = ("--follow-seconds", str(DRAIN_SECONDS), "--skew", str(skew), "--hot-rate", str(hot_rate))
        writer = self._start_client(f"{name}-write", "write", rate, seconds, population, *follow, *together)
        time.sleep(max(0.0, start_at - time.time()))
        sampler.start()
        with self._cpu() as cpu:
            time.sleep(seconds)
        stop.set()
        sampler.join()
        recovery = self._drain()
        events, reads = self._finish(writer), self._finish(reader) if reader else None
        delta = self._runtime.read_metrics()
        delta.subtract(before)
        asked = {
            "events_per_second": rate,
            "hot_user_events_per_second": hot_rate,
            "seconds": seconds,
            "users": len(users),
        }
        measured = {"events": events, "reads": reads, "backlog": backlog.summary(), "recovery_seconds": recovery}
        return {**asked, **measured, "worker": _worker(delta), **cpu}

    def _feed(self, users: Iterator[str]) -> None:
        item, query = self._population.items[0], self._population.queries[0]
        feed(self._client, (Event(user_id=user, item_id=item, query=query) for user in users), self._config)

    def _start_reader(self, name: str, seconds: float, *more: str) -> tuple[subprocess.Popen[bytes], Path]:
        population = self._population.write(self._runtime.folder / "population.json")
        return self._start_client(f"{name}-read", "read", self._read_rate, seconds, population, *more)

    def _start_client(
        self, name: str, kind: str, rate: float, seconds: float, population: Path, *more: str
    ) -> tuple[subprocess.Popen[bytes], Path]:
        output = self._runtime.folder / f"{name}.json"
        command = (
            *(sys.executable, "-m", "benchmarks.serving.load", kind, "--port", *map(str, self._runtime.ports)),
            *("--rate", str(rate), "--seconds", str(seconds), "--population", str(population)),
            *("--output", str(output), *more),
        )
        return self._runtime.start(name, command, self._runtime.cores.clients), output

    def _finish(self, started: tuple[subprocess.Popen[bytes], Path]) -> dict[str, Any]:
        process, output = started
        if process.wait(DRAIN_SECONDS) != 0:
            raise RuntimeError(f"{output.stem}: the client failed; see its log in {output.parent}")
        found: dict[str, Any] = json.loads(output.read_text())
        return found

    def _sample(self, backlog: Backlog, users: list[str], stop: threading.Event) -> None:
        keys = [waiting_key(user) for user in users]
        client = self._runtime.client
        while not stop.wait(SAMPLE_SECONDS):
            with client.pipeline(transaction=False) as pipe:
                pipe.xlen(STREAM)
                pipe.exists(*keys)
                entries, waiting = pipe.execute()
            backlog.entries.append(entries)
            backlog.users.append(waiting)

    def _drain(self) -> float:
        """Seconds until at most one batch waits; then wait for the rest, too."""
        started = time.monotonic()
        recovered = None
        while (length := self._client.xlen(STREAM)) and time.monotonic() - started < DRAIN_SECONDS:
            if recovered is None and int(length) <= self._config.batch_size:  # type: ignore[arg-type]  # redis-py types it as if it could be awaited
                recovered = time.monotonic() - started
            time.sleep(0.1)
        if length:
            raise RuntimeError(f"{length} events still wait {DRAIN_SECONDS:g} s after the load ended")
        return round(recovered if recovered is not None else time.monotonic() - started, 1)

    @contextmanager
    def _cpu(self) -> Iterator[dict[str, Any]]:
        """Cores that each process kept busy meanwhile; clients that start meanwhile count from their start."""
        found: dict[str, Any] = {}
        before, stolen, started = self._runtime.cpu_seconds(), psutil.cpu_times().steal, time.monotonic()
        yield found
        after, elapsed = self._runtime.cpu_seconds(), time.monotonic() - started
        found["busy_cores"] = {name: round((after[name] - before[name]) / elapsed, 3) for name in after}
        found["stolen_cores"] = round((psutil.cpu_times().steal - stolen) / elapsed, 4)


def _worker(delta: Counter[str]) -> dict[str, Any]:
    """What the workers say of the same time: events a user inferred, time by part, shares visible in time."""
    count = delta["urm_event_to_visible_seconds_count"] or 1
    users = delta["urm_worker_user_inferences_total"] or 1
    parts = {part: delta[f"urm_worker_stage_seconds_sum{{part={part}}}"] for part in ("history", "inference", "store")}
    return {
        "events_done": delta["urm_worker_events_total{outcome=done}"],
        "users_inferred": delta["urm_worker_user_inferences_total"],
        "events_per_inference": delta["urm_worker_events_total{outcome=done}"] / users,
        "failed": delta["urm_worker_events_total{outcome=failed}"],
        "dead": delta["urm_worker_events_total{outcome=dead}"],
        "mean_visible_seconds": delta["urm_event_to_visible_seconds_sum"] / count,
        "share_visible_within": {le: delta[_VISIBLE % le] / count for le in ("1.0", "5.0", "15.0", "60.0")},
        "milliseconds_a_user": {part: round(1000 * seconds / users, 2) for part, seconds in parts.items()},
    }
