"""How far one Redis goes: processor time per operation, bytes per user, its files, reads beside writes. No model.

    python -m benchmarks.one_redis --output one_redis.jsonl --users 10000 100000

starts a Redis as `urm up` does, with nothing in it, for each line of the output (REDIS_SERVER names another program):

    bytes     of a user's live history by its length, of results, of an event while it waits and afterwards
    users     with so many users, who all have results; live events are theirs by Zipf's law:
              `costs`    time of Redis' main thread per operation, and what it adds to the append-only file
              `reads`    latencies alone, beside commits that keep Redis' core busy in part or wholly, in a rewrite
              `rewrite`, `snapshot`    seconds, files, and memory that they take

Operations are those of the runtime (its scripts, its stream, its store), with made-up results in place of the model's.
What the API sends, and commits under load, are recorded first and then played by processes of their own, so that Redis
is measured and not Python. `cpu_us` is Redis' own count and holds on a busy machine, too, as do latencies on its clock
(`redis_ms`); other times do not. Lines that the output has are not measured again.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import chain, cycle, takewhile
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil

from benchmarks.lines import append_line, read_lines
from benchmarks.redis_load import Call, Meter, Recorder, open_server, play
from benchmarks.serving.load import percentiles, skewed
from components.config import RunConfig, load_named_config
from components.evaluation.report import markdown
from components.recall.api.gateway import queue_reads
from components.recall.state.events import Event, accept_arguments
from components.recall.state.scripts import (
    ACCEPT,
    COMMIT,
    FILL,
    STREAM,
    accepted_key,
    history_keys,
    result_key,
    waiting_key,
)
from components.recall.state.store import Commit, RecentEvents, Result, UserStore
from components.recall.state.stream import Entry, EventStream
from components.redis_client import open_redis
from components.release.publication import SERVING, Publication, name_worker
from components.settings import get_settings

PLAYERS = 2  # processes that play what was recorded
BUSY, BUSY_IN_REWRITE = 0.6, 0.2  # share of Redis' core that commits take beside reads
LENGTHS, BYTES_USERS = (1, 16, 64, 200), 8  # of live histories whose bytes are looked at, and how many of each
MIXES = ((1.0, 1.0), (1.0, 10.0), (4.0, 10.0))  # events per inference, reads per event
BYTES_PER_USER = 40_000  # more than a user takes, for a look at the memory beforehand
_BLOCK = 2_000  # events or users recorded at a time
_SHARED = 32  # reads of one round trip, as the API lets them share one when many come
_LIST = 100  # events of one request that sends several
_RELEASE = "made-up-0123456789ab"
_LOOK_SECONDS = 0.05

_Found = TypeVar("_Found")


class World:
    """A Redis with users, and what API, worker and back-fill do in it."""

    def __init__(self, url: str, config: RunConfig, players: ProcessPoolExecutor, num_users: int, skew: float) -> None:
        self.url, self.players = url, players
        self.client = open_redis(url)
        self.config, self.tasks = config.recall, [task.name for task in config.tasks]
        self.meter = Meter(self.client)
        self.users = [str(10_000_000 + number) for number in range(num_users)]
        self._activity = skewed(num_users, skew)
        self._random = np.random.default_rng(0)
        self._worker = name_worker()
        self._stream = EventStream(self.client, self._worker, self.config)
        self._stream.ensure_group()
        self._store = UserStore(self.client, self.config)
        self._batches = 0
        self._clock = datetime.now(UTC) - timedelta(days=1)
        self._rankings = [self._rank() for _ in range(64)]
        publication = Publication(release=_RELEASE, bundle="/made-up", order=1)
        self.client.set(SERVING, publication.model_dump_json())
        for script in (ACCEPT, COMMIT, FILL):
            self.client.script_load(script)

    def feed(self, count: int, name: str, per_request: int = 1) -> None:
        """Accept so many events of users by their activity, and finish them."""
        users = self._random.choice(self.users, count, p=self._activity)
        for block in _split(users, _BLOCK):
            self.accept(self.make_events(block), name, per_request)
            self.work()

    def make_events(self, users: Iterable[str]) -> list[Event]:
        """An event of each user, one millisecond apart."""
        events = []
        for user in users:
            self._clock += timedelta(milliseconds=1)
            events.append(Event(user_id=str(user), item_id=int(self._random.integers(10**6, 10**7)), ts=self._clock))
        return events

    def accept(self, events: Sequence[Event], name: str, per_request: int = 1) -> None:
        """Let the API's script accept events."""
        recorder = Recorder(self.client)
        script = recorder.register_script(ACCEPT)
        for part in _split(events, per_request):
            with recorder.pipeline(transaction=False) as pipe:
                for event in part:
                    script(**accept_arguments(event, self.config), client=pipe)
                pipe.execute()
        self.play(recorder.calls, name, len(events), "1")

    def work(self) -> None:
        """Do what a worker does with all that waits, but for the model's part."""
        while True:
            with self.meter.count("claim") as done:
                entries = self._stream.claim_stale(self.config.batch_size)
                entries += self._stream.read(self.config.batch_size, 1)
                entries += self._stream.read_ahead(entries)
                done.append(len(entries))
            if not entries:
                return
            with self.meter.count("history") as done:
                commits = self._infer(entries)
                done.append(len(commits))
            with self.meter.count("commit") as done:
                answers = self._commit(self._store, commits)
                done.append(len(answers))
            _require(Counter(map(str, answers)), str(len(self.tasks)), len(commits))

    def fill(self) -> None:
        """Let the back-fill store results of every user."""
        for block in _split(self.users, _BLOCK):
            recorder = Recorder(self.client)
            store = UserStore(recorder, self.config)
            for part in _split(block, self.config.batch_size):
                results = {user: self._results(None) for user in part}
                store.fill(results, {user: RecentEvents([]) for user in part}, order=1)
            self.play(recorder.calls, "fill", len(block), str(len(self.tasks)))

    def record_reads(self, count: int, per_trip: int = 1) -> list[Call]:
        """What the API sends to read one result of so many users, by their activity."""
        recorder = Recorder(self.client)
        users = self._random.choice(self.users, count, p=self._activity)
        keys = [result_key(str(user), self.tasks[number % len(self.tasks)]) for number, user in enumerate(users)]
        for part in _split(keys, per_trip):
            with recorder.pipeline(transaction=False) as pipe:
                queue_reads(pipe, part)
                pipe.execute()
        return recorder.calls

    def record_commits(self, count: int) -> list[Call]:
        """Accept an event of each of so many users, and what a worker sends to finish them, batch by batch."""
        users = self._random.choice(self.users, min(count, len(self.users)), replace=False)
        self.accept(self.make_events(users), "accept")
        recorder, taken = Recorder(self.client), 0
        store = UserStore(recorder, self.config)
        while taken < len(users):
            entries = self._stream.read(self.config.batch_size, 1)
            self._commit(store, self._infer(entries))
            taken += len(entries)
        return recorder.calls

    def read(self, count: int, name: str, per_trip: int = 1) -> None:
        """Read so many results."""
        calls = self.record_reads(count, per_trip)
        self.play(calls, name, count, "str", count + len(calls))  # each trip reads what serves, too

    def play(self, calls: list[Call], name: str, operations: int, expected: str, answers: int = 0) -> None:
        """Let all players play calls at once, and charge them to operations, with one answer each if not told."""
        with self.meter.count(name) as done:
            self.finish(self.start(calls), expected, answers or operations)
            done.append(operations)

    def start(self, calls: list[Call], rate: float = 0.0) -> list[Future[Any]]:
        """Begin to play calls, each once; `rate` is that of all players together."""
        parts = [calls[number::PLAYERS] for number in range(PLAYERS)]
        return [
            self.players.submit(play, self.url, part, rate / PLAYERS, seed) for seed, part in enumerate(parts) if part
        ]

    def finish(self, playing: Sequence[Future[Any]], expected: str, count: int) -> None:
        """Wait for the players.

        Raises:
            RuntimeError: Redis has given another answer than expected.
        """
        answers = sum((future.result().answers for future in playing), Counter[str]())
        answers.pop("list", None)  # to SCRIPT EXISTS
        _require(answers, expected, count)

    def used_memory(self) -> int:
        """Bytes that Redis has taken."""
        memory: Any = self.client.info("memory")
        return int(memory["used_memory"])

    def usage(self, keys: Iterable[str]) -> int:
        """Bytes that keys take, with their names; 0 of one that is not there."""
        with self.client.pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.memory_usage(key, samples=0)
            return sum(taken or 0 for taken in pipe.execute())

    def _infer(self, entries: Sequence[Entry]) -> list[Commit]:
        groups: defaultdict[str, list[Entry]] = defaultdict(list)
        for entry in entries:
            groups[entry.event.user_id].append(entry)
        stored, commits = self._store.recent(list(groups)), []
        for user, group in groups.items():
            recent, _ = stored[user].join([entry.event for entry in group], self.config.history_events)
            commits.append(Commit(group, recent, self._results(recent.events[-1])))
        return commits

    def _commit(self, store: UserStore, commits: Sequence[Commit]) -> list[int | None]:
        self._batches += 1
        return store.commit(commits, release=_RELEASE, order=1, batch=f"{self._worker}/{self._batches}")

    def _results(self, newest: Event | None) -> dict[str, Result]:
        chosen = self._random.integers(len(self._rankings), size=len(self.tasks))
        about = {"release": _RELEASE, "event_id": newest and newest.event_id, "event_ts": newest and newest.ts}
        about["computed_at"] = datetime.now(UTC)
        return {
            task: Result(item_ids=self._rankings[number][0], scores=self._rankings[number][1], **about)
            for task, number in zip(self.tasks, chosen, strict=True)
        }

    def _rank(self) -> tuple[list[int], list[float]]:
        """As long as the model's: ids of seven digits, and floats of 32 bits."""
        scores = np.sort(self._random.random(self.config.k, dtype=np.float32))[::-1]
        return self._random.integers(10**6, 10**7, self.config.k).tolist(), scores.tolist()


def measure_bytes(world: World) -> dict[str, dict[str, int]]:
    """Bytes of keys by the length of a user's live history; marks and entries per event, the rest per user."""
    found = {}
    for number, length in enumerate(LENGTHS):
        users = world.users[number * BYTES_USERS : (number + 1) * BYTES_USERS]
        events = world.make_events(chain.from_iterable([user] * length for user in users))
        marks = [accepted_key(event.user_id, event.event_id) for event in events]
        world.accept(events, "accept", _LIST)
        waiting = {
            "entry_while_it_waits": world.usage([STREAM, *map(waiting_key, users)]) / len(events),
            "mark_while_it_waits": world.usage(marks) / len(events),
        }
        world.work()
        results = [result_key(user, task) for user in users for task in world.tasks]
        found[str(length)] = {name: round(value) for name, value in waiting.items()} | {
            "mark": round(world.usage(marks) / len(events)),
            "history": round(world.usage(chain.from_iterable(map(history_keys, users))) / len(users)),
            "results": round(world.usage(results) / len(users)),
        }
    return found


def measure_users(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Costs of operations, latencies of reads and files with the world's users."""
    # Rewrites come when they are asked for, and disturb nothing else.
    world.client.config_set("auto-aof-rewrite-percentage", 0)
    empty = world.used_memory()
    world.fill()
    filled = world.used_memory()
    num_events = int(options.events_per_user * len(world.users))
    world.feed(num_events, "accept")
    active = world.used_memory()
    world.feed(num_events // 10, "accept_list", _LIST)
    world.read(options.reads, "read")
    world.read(options.reads, "read_shared", _SHARED)
    return {
        "events": num_events,
        "used_memory": active,
        "bytes_per_user": round((filled - empty) / len(world.users)),
        "bytes_per_event": round((active - filled) / num_events),
        "costs": world.meter.summary(),
        **_measure_loads(world, options),
    }


def _measure_loads(world: World, options: argparse.Namespace) -> dict[str, Any]:
    """Reads at a rate, alone and beside commits; then beside commits and a rewrite of the append-only file."""
    probes = world.record_reads(options.reads)

    def probe(going: Callable[[], bool]) -> dict[str, Any]:
        calls = chain(probes[:1], takewhile(lambda _: going(), cycle(probes)))  # one, however short the load is
        played = play(world.url, calls, options.read_rate)
        return {"latency_ms": percentiles(played.latency_ms), "redis_ms": percentiles(played.redis_ms)}

    def rewrite(_: Callable[[], bool]) -> tuple[dict[str, Any], dict[str, Any]]:
        ended = threading.Event()
        with ThreadPoolExecutor(1) as threads:
            probing = threads.submit(probe, lambda: not ended.is_set())
            try:
                figures = _watch(world, world.client.bgrewriteaof, "aof_rewrite_in_progress")
            finally:
                ended.set()
        return figures, probing.result()

    end = time.perf_counter() + options.seconds
    reads = {"alone": probe(lambda: time.perf_counter() < end)}
    for name, share in (("beside_commits", BUSY), ("beside_saturation", 1.0)):
        load, latencies = _beside_commits(world, share, options.seconds, probe)
        reads[name] = load | latencies
    file_before = world.meter.file_bytes()
    load, (figures, latencies) = _beside_commits(world, BUSY_IN_REWRITE, options.seconds, rewrite)
    reads["during_rewrite"] = load | latencies
    persistence: Any = world.client.info("persistence")
    figures |= {"file_before": file_before, "file_after": persistence["aof_base_size"]}
    snapshot = _watch(world, world.client.bgsave, "rdb_bgsave_in_progress")
    snapshot["file"] = (options.folder / "dump.rdb").stat().st_size
    return {"reads": reads, "rewrite": figures, "snapshot": snapshot}


def _beside_commits(
    world: World, share: float, seconds: float, act: Callable[[Callable[[], bool]], _Found]
) -> tuple[dict[str, Any], _Found]:
    """Commit at a share of Redis' core, as fast as can be at 1, and act meanwhile; `act` may ask whether it goes on."""
    per_second = share * 1e6 / world.meter.cpu_us("commit")
    calls = world.record_commits(round(per_second * seconds))
    cpu, started = world.meter.cpu_seconds(), time.perf_counter()
    playing = world.start(calls, per_second / world.config.batch_size if share < 1 else 0.0)
    found = act(lambda: any(not future.done() for future in playing))
    commits = sum(call[-1][1] for call in calls)
    world.finish(playing, str(len(world.tasks)), commits)
    cpu, wall = world.meter.cpu_seconds() - cpu, time.perf_counter() - started
    return {"commits_per_second": round(commits / wall), "busy": round(cpu / wall, 3)}, found


def _watch(world: World, start: Callable[[], Any], flag: str) -> dict[str, float]:
    """Start what a child of Redis does, and see what it takes until it has ended."""
    before: Any = world.client.info()
    started, peak = time.perf_counter(), Counter[str]()
    start()
    while True:
        time.sleep(_LOOK_SECONDS)
        now: Any = world.client.info()
        for name in ("used_memory", "used_memory_rss", "current_cow_size"):
            peak[name] = max(peak[name], now[name])
        if not now[flag]:
            break
    children = ("used_cpu_user_children", "used_cpu_sys_children")
    return {
        "seconds": round(time.perf_counter() - started, 2),
        "child_cpu_seconds": round(sum(now[name] - before[name] for name in children), 2),
        "fork_ms": now["latest_fork_usec"] / 1000,
        "copied_bytes": max(peak["current_cow_size"], now[f"{flag[:3]}_last_cow_size"]),
        "used_memory_growth": peak["used_memory"] - before["used_memory"],
        "peak_rss": peak["used_memory_rss"],
    }


def plan_events(costs: dict[str, Any], per_inference: float, reads_per_event: float, busy: float = BUSY) -> float:
    """Events per second at which Redis' core is busy to a share.

    Args:
        costs: Of a line.
        per_inference: How many events of a user one inference covers.
        reads_per_event: Reads of one result each, none sharing a round trip.
        busy: The share.
    """
    cpu = {name: cost["cpu_us"] for name, cost in costs.items()}
    per_event = cpu["accept"] + cpu["claim"] + reads_per_event * cpu["read"]
    return busy * 1e6 / (per_event + (cpu["history"] + cpu["commit"]) / per_inference)


def show(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown tables of the lines with users."""
    tables: list[tuple[str, Callable[[dict[str, Any]], dict[str, str]]]] = [
        ("Microseconds of Redis' main thread per operation:", _show_costs),
        (f"Events per second at {BUSY:.0%} of Redis' core, and memory:", _show_plan),
        ("Milliseconds of reads:", _show_reads),
        ("Rewrite of the append-only file:", _show_rewrite),
    ]
    of_users = sorted((line for line in lines if line["users"]), key=lambda line: line["users"])
    shown = []
    for title, columns in tables if of_users else []:
        rows = [{"users": f"{line['users']:,}"} | columns(line) for line in of_users]
        shown.append(f"{title}\n\n{markdown(list(rows[0]), [list(row.values()) for row in rows])}")
    return "\n\n".join(shown)


def _show_costs(line: dict[str, Any]) -> dict[str, str]:
    return {name: f"{cost['cpu_us']:.0f}" for name, cost in line["costs"].items()}


def _show_plan(line: dict[str, Any]) -> dict[str, str]:
    plans = {
        f"events/s, {events:g} per inference, {reads:g} reads each": f"{plan_events(line['costs'], events, reads):,.0f}"
        for events, reads in MIXES
    }
    memory = line["bytes_per_user"]
    return plans | {"bytes per user": f"{memory:,}", "users per GiB": f"{2**30 / memory:,.0f}"}


def _show_reads(line: dict[str, Any]) -> dict[str, str]:
    both = (("on Redis' clock, ", "redis_ms"), ("", "latency_ms"))
    return {
        f"{name}, {clock}p99": f"{load[of]['p99']:.2f}" for name, load in line["reads"].items() for clock, of in both
    }


def _show_rewrite(line: dict[str, Any]) -> dict[str, str]:
    rewrite = line["rewrite"]
    sizes = {name: f"{rewrite[name] / 1e6:,.0f} MB" for name in ("file_before", "file_after", "copied_bytes")}
    return sizes | {name: f"{rewrite[name]:.1f}" for name in ("seconds", "child_cpu_seconds", "fork_ms")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, then print the tables."""
    options = _parse(arguments)
    done = {line["users"]: line for line in read_lines(options.output)}
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for num_users in (0, *options.users):
        if num_users in done:
            continue
        print(f"{num_users:,} users" if num_users else "bytes", flush=True)
        line = _measure(num_users, options)
        append_line(options.output, line)
        done[num_users] = line
    print(show(done.values()))


def _measure(num_users: int, options: argparse.Namespace) -> dict[str, Any]:
    """A line; that of no users says how many bytes things take."""
    config = load_named_config(options.config, get_settings().configs_dir, options.set)
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=options.output.parent) as folder,
        open_server(Path(folder)) as url,
        ProcessPoolExecutor(PLAYERS, mp_context=spawn) as players,
    ):
        options.folder = Path(folder)
        world = World(url, config, players, num_users or BYTES_USERS * len(LENGTHS), options.skew)
        about: Any = world.client.info("server")
        program = "valkey" if "valkey_version" in about else "redis"
        line = {"users": num_users, "server": f"{program} {about[f'{program}_version']}"}
        line |= {"tasks": len(world.tasks), "k": world.config.k}
        return line | (measure_users(world, options) if num_users else {"bytes": measure_bytes(world)})


def _require(answers: Counter[str], expected: str, count: int) -> None:
    if answers != {expected: count}:
        raise RuntimeError(f"answers of Redis: expected {expected} {count} times, got {dict(answers)}")


def _split(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="complete_journey", help="tasks, and `recall`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--skew", type=float, default=1.0, help="of the users' activity; 0: all alike")
    parser.add_argument("--events-per-user", type=float, default=1.0, help="in the mean; most users have none")
    parser.add_argument("--reads", type=int, default=20_000, help="that are measured by their cost")
    parser.add_argument("--read-rate", type=float, default=200.0, help="reads per second whose latency is measured")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each load")
    parser.add_argument("--output", type=Path, required=True, help="JSON lines; Redis' files lie beside it meanwhile")
    options = parser.parse_args(arguments)
    needed, free = BYTES_PER_USER * max(options.users), psutil.virtual_memory().available
    if 2 * needed > free:  # what a rewrite copies comes on top
        parser.error(
            f"option --users: expected twice {needed / 1e9:.1f} GB of free memory for {max(options.users):,}, got "
            f"{free / 1e9:.1f}; ask for fewer"
        )
    return options


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # no Redis is left behind
    main()
