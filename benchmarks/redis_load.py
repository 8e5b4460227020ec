"""A Redis of a benchmark's own: started, sent what was recorded before, and asked what that cost it."""

from __future__ import annotations

import os
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import redis
from redis.client import Pipeline

from benchmarks.serving.load import Floats
from components.local.processes import HOST, choose_port
from components.local.services import DURABLE, redis_server
from components.redis_client import open_redis

Call = list[tuple[bytes, int]]  # round trips of one request: packed commands, and how many answers they get
_LOOK_SECONDS = 0.05
_PACKER = redis.Connection()  # never connected


@contextmanager
def open_server(folder: Path) -> Iterator[str]:
    """The address of a Redis with the durability of `urm up`, its state in a folder."""
    port, program = choose_port(taken=set()), os.environ.get("REDIS_SERVER") or redis_server()
    address = ("--bind", HOST, "--port", str(port), "--dir", str(folder))
    server = subprocess.Popen([program, *address, *DURABLE], stdout=subprocess.DEVNULL)
    url = f"redis://{HOST}:{port}/0"
    try:
        while not _answers(url):
            time.sleep(_LOOK_SECONDS)
            if server.poll() is not None:
                raise RuntimeError(f"{program} has ended with exit code {server.returncode}")
        yield url
    finally:
        server.kill()
        server.wait()


class Tape(Pipeline):
    """A pipeline that keeps what it would send, and says that all of it succeeded."""

    calls: list[Call]

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        """Append one call; redis-py asks first whether the scripts are there, on a round trip of its own."""
        pack = _PACKER.pack_commands
        trips: list[list[Any]] = [[("SCRIPT EXISTS", *(script.sha for script in self.scripts))]] if self.scripts else []
        trips.append([command for command, _ in self.command_stack])
        self.calls.append([(b"".join(pack(trip)), len(trip)) for trip in trips])
        self.reset()
        return [1] * len(trips[-1])


class Recorder(redis.Redis):
    """A client whose pipelines are tapes."""

    def __init__(self, client: redis.Redis) -> None:
        super().__init__(connection_pool=client.connection_pool)
        self.calls: list[Call] = []

    def pipeline(self, transaction: bool = True, shard_hint: Any = None) -> Tape:
        """A tape; its calls end up here."""
        tape = Tape(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        tape.calls = self.calls
        return tape


class Played(NamedTuple):
    """What became of calls.

    Attributes:
        answers: Numbers, else their type, and how often each came.
        latency_ms: Of each call since it was due.
        redis_ms: Processor time of Redis since it was sent: its latency, had Redis a core of its own.
    """

    answers: Counter[str]
    latency_ms: list[float]
    redis_ms: list[float]


def play(url: str, calls: Iterable[Call], rate: float = 0.0, seed: int = 0) -> Played:
    """Send calls one after another on one connection to a Redis of this machine.

    Args:
        url: Of Redis.
        calls: What to send.
        rate: Calls per second, due at times of a Poisson process whatever became of the earlier ones; 0: at once.
        seed: Of these times.
    """
    client: Any = open_redis(url)
    connection, random = client.connection_pool.get_connection(), np.random.default_rng(seed)
    clock = ~client.info("server")["process_id"] << 3 | 2  # that of another process, as clock_getcpuclockid makes it
    played = Played(Counter(), [], [])
    due = time.perf_counter()
    for call in calls:
        due = due + random.exponential(1 / rate) if rate else time.perf_counter()
        time.sleep(max(0.0, due - time.perf_counter()))
        worked = time.clock_gettime(clock)
        for packed, count in call:
            connection.send_packed_command([packed])
            found = [connection.read_response() for _ in range(count)]
            played.answers.update(str(one) if isinstance(one, int) else type(one).__name__ for one in found)
        played.latency_ms.append(1000 * (time.perf_counter() - due))
        played.redis_ms.append(1000 * (time.clock_gettime(clock) - worked))
    connection.disconnect()
    return played


class Meter:
    """What operations cost Redis."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._sums: defaultdict[str, Floats] = defaultdict(lambda: np.zeros(4))

    @contextmanager
    def count(self, name: str) -> Iterator[list[int]]:
        """Charge what Redis does meanwhile to so many operations of this name as are put into the list."""
        done: list[int] = []
        written, seconds, cpu = self.file_bytes(), time.perf_counter(), self.cpu_seconds()
        yield done
        cpu, seconds = self.cpu_seconds() - cpu, time.perf_counter() - seconds
        self._sums[name] += [sum(done), cpu, seconds, self.file_bytes() - written]

    def cpu_us(self, name: str) -> float:
        """Microseconds of Redis' main thread per operation."""
        return float(1e6 * self._sums[name][1] / self._sums[name][0])

    def summary(self) -> dict[str, dict[str, float]]:
        """By operation."""
        found = {}
        for name, (operations, cpu, wall, written) in self._sums.items():
            found[name] = {
                "operations": int(operations),
                "cpu_us": round(1e6 * cpu / operations, 2),
                "per_second_at_full_core": round(operations / cpu),
                "wall_us": round(1e6 * wall / operations, 2),
                "busy": round(cpu / wall, 3),
                "file_bytes": round(written / operations),
            }
        return found

    def cpu_seconds(self) -> float:
        """Of Redis' main thread, so far."""
        cpu: Any = self._client.info("cpu")
        return float(cpu["used_cpu_user_main_thread"] + cpu["used_cpu_sys_main_thread"])

    def file_bytes(self) -> int:
        """Of the append-only file."""
        files: Any = self._client.info("persistence")
        return int(files["aof_current_size"])


def _answers(url: str) -> bool:
    try:
        with open_redis(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False
