"""Several recall workers in one container: processes that are watched and started again.

Python runs one thread at a time between matrix products, and a batch of one worker waits for Redis and for parsing;
a second process fills these gaps. Instances share the files of a release, which are mapped into memory, and by forking
the libraries (docs/sizing.md has the figures).

An instance that ends is started again after a pause that doubles with every early end. One whose heartbeat has been
missing for `stuck_seconds`, while Redis answers, is killed first: its process may live and do nothing. The container is
alive while the supervisor turns, and ready while an instance serves a release to the event stream, or to ad-hoc
requests where no instance is there for the stream.

In a pod, whose release never changes, a mistake in the input ends an instance for good, and with it the supervisor: its
sentence is the last line of the log, which Kubernetes keeps as the pod's termination message.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import redis
import structlog

from components.exceptions import RelayedError, UserError
from components.recall.process.forks import Program, read_sentence, start
from components.release.publication import WORKER_PREFIX, name_worker

log = structlog.get_logger()

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
HEALTHY_SECONDS = 60.0  # an instance that ran for so long has no early end
# A Redis that hangs holds up a turn for twice this long (it connects, then asks), far less than health.STALE_SECONDS.
REDIS_TIMEOUT_SECONDS = 2.0
GRACE_SECONDS = 20.0  # from SIGTERM to SIGKILL; Kubernetes gives a pod 30, and a turn may have to end first
_TURN_SECONDS = 0.2


@dataclass
class Instance:
    """One place for a worker process.

    Attributes:
        number: From 0 on.
        cores: Cores it may run on.
        process: Current process, or none while it pauses.
        sentence: Where that says why it ends.
        started_at: When that process was started, by the monotonic clock.
        silent_since: Since when its heartbeat is missing; none if it is there or unknown.
        start_at: When the next process is due.
        pause: Length of the next pause, seconds.
        starts: Processes so far.
        release: Release it serves; empty before the first, or while unknown.
        ad_hoc: Whether its worker answers ad-hoc requests.
        worker: Name under which its worker sends heartbeats.
    """

    number: int
    cores: frozenset[int]
    process: BaseProcess | None = None
    sentence: Connection | None = None
    started_at: float = 0.0
    silent_since: float | None = None
    start_at: float = 0.0
    pause: float = FIRST_PAUSE_SECONDS
    starts: int = 0
    release: str = ""
    ad_hoc: bool = False
    worker: str = ""


@dataclass(frozen=True)
class InstanceState:
    """State of one instance.

    Attributes:
        instance: Its number.
        pid: Of its process, none while it pauses.
        release: Release it serves, or empty.
        restarts: Processes after the first one.
        ad_hoc: Whether it answers ad-hoc requests and not the event stream.
    """

    instance: int
    pid: int | None
    release: str
    restarts: int
    ad_hoc: bool = False


@dataclass(frozen=True)
class State:
    """State of the supervisor.

    Attributes:
        turned_at: When its loop last turned, by the monotonic clock.
        instances: One by one.
    """

    turned_at: float = field(default_factory=time.monotonic)
    instances: tuple[InstanceState, ...] = ()

    @property
    def ready(self) -> bool:
        """Whether an instance serves a release to the event stream; to ad-hoc requests where there is no other."""
        of_stream = [instance for instance in self.instances if not instance.ad_hoc]
        return any(instance.release for instance in of_stream or self.instances)


class Supervisor:
    """Keeps instances running until `stop`."""

    def __init__(
        self,
        program: Callable[[int], Program],
        instances: int,
        threads: int,
        client: redis.Redis,
        stuck_seconds: float,
        ad_hoc: int = 0,
        ends_with_instance: bool = False,
    ) -> None:
        """Take what to run.

        Args:
            program: What an instance runs, by its number.
            instances: How many.
            threads: Of matrix work of each.
            client: To read heartbeats with; returns str.
            stuck_seconds: How long a heartbeat may be missing.
            ad_hoc: Instances for ad-hoc requests beside those; theirs are the last numbers.
            ends_with_instance: Whether a mistake in the input that ends an instance ends the supervisor.
        """
        self.state = State()
        self._program = program
        self._client = client
        self._stuck_seconds = stuck_seconds
        self._ends_with_instance = ends_with_instance
        self._stopping = False
        self._instances = [
            Instance(number, cores, ad_hoc=number >= instances)
            for number, cores in enumerate(share_cores(instances + ad_hoc, threads))
        ]

    def stop(self) -> None:
        """End all instances, then return from `run`."""
        self._stopping = True

    def run(self) -> None:
        """Keep the instances running; returns after `stop`, when all have ended.

        Raises:
            RelayedError: What ended an instance, after all others have ended, too.
        """
        try:
            while not self._stopping:
                self._turn()
                time.sleep(_TURN_SECONDS)
        finally:
            self._end_all()
            self._client.close()

    def _turn(self) -> None:
        heartbeats = self._read_heartbeats()
        now = time.monotonic()
        for instance in self._instances:
            if instance.process is None:
                if now >= instance.start_at:
                    self._start(instance)
            elif instance.process.exitcode is not None:
                self._raise_if_final(instance, instance.process.exitcode)
                self._pause(instance, f"ended with exit code {instance.process.exitcode}")
            elif self._is_stuck(instance, heartbeats, now):
                log.error("instance is stuck", instance=instance.number, pid=instance.process.pid)
                instance.process.kill()
                instance.process.join()
                self._pause(instance, "was killed because its heartbeat was missing")
        self.state = State(now, tuple(_describe(instance) for instance in self._instances))

    def _start(self, instance: Instance) -> None:
        program, name = self._program(instance.number), f"instance-{instance.number}"
        instance.process, instance.sentence = start(program, instance.cores, name)
        instance.worker = name_worker(instance.process.pid)
        instance.started_at, instance.silent_since = time.monotonic(), None
        instance.starts += 1
        log.info(
            "instance started", instance=instance.number, pid=instance.process.pid, cores=sorted(instance.cores),
            starts=instance.starts,
        )  # fmt: skip

    def _raise_if_final(self, instance: Instance, exit_code: int) -> None:
        """End with an instance that would end in the same way again."""
        if self._ends_with_instance and exit_code == UserError.exit_code and instance.sentence is not None:
            unknown = f"instance {instance.number} ended with exit code {exit_code}"
            raise RelayedError(read_sentence(instance.sentence) or unknown)

    def _pause(self, instance: Instance, what: str) -> None:
        early = time.monotonic() - instance.started_at < HEALTHY_SECONDS
        pause = instance.pause if early else FIRST_PAUSE_SECONDS
        log.warning("instance " + what, instance=instance.number, again_in_seconds=pause)
        instance.process, instance.release = None, ""
        instance.start_at = time.monotonic() + pause
        instance.pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    def _is_stuck(self, instance: Instance, heartbeats: list[str | None] | None, now: float) -> bool:
        heartbeat = heartbeats[instance.number] if heartbeats is not None else None
        instance.release = heartbeat or ""
        if heartbeats is None or heartbeat is not None:
            instance.silent_since = None
        elif instance.silent_since is None:
            instance.silent_since = now
        return instance.silent_since is not None and now - instance.silent_since > self._stuck_seconds

    def _read_heartbeats(self) -> list[str | None] | None:
        """Last heartbeat of each instance's worker, None where it is missing; None where Redis does not answer."""
        try:
            heartbeats: list[str | None] = self._client.mget([WORKER_PREFIX + one.worker for one in self._instances])  # type: ignore[assignment]  # redis-py types it as if it could be awaited
        except redis.RedisError:
            return None
        return heartbeats

    def _end_all(self) -> None:
        running = [instance.process for instance in self._instances if instance.process is not None]
        for process in running:
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in running:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                log.error("instance did not end in time", pid=process.pid)
                process.kill()
                process.join()


def share_cores(instances: int, threads: int) -> list[frozenset[int]]:
    """Cores for each instance: as many as it has threads, and none twice before all are used.

    Where the instances do not need all cores, the kernel chooses: the others may be in use by another container on the
    same machine, which would choose the same ones.
    """
    cores = sorted(os.sched_getaffinity(0))
    if instances * threads < len(cores):
        return [frozenset(cores)] * instances
    return [
        frozenset(cores[(number * threads + thread) % len(cores)] for thread in range(threads))
        for number in range(instances)
    ]


def _describe(instance: Instance) -> InstanceState:
    pid = instance.process.pid if instance.process else None
    return InstanceState(instance.number, pid, instance.release, max(0, instance.starts - 1), instance.ad_hoc)
