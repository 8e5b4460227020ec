"""Main loop of every worker: serve a release, process work until stopped, wait while Redis is unavailable."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import redis
import structlog

from components.recall.serving.answers import probe
from components.recall.serving.engine import ServingRelease
from components.recall.state.store import RecentEvents
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.metrics import WorkerMetrics
from components.recall.worker.source import Load, ReleaseSource
from components.redis_client import is_unavailable
from components.release.publication import name_worker, send_heartbeat, unregister

log = structlog.get_logger()
# Makes the source of a worker's release of a Redis client, the worker's name, the loader and the worker's metrics.
MakeSource = Callable[[redis.Redis, str, Load, WorkerMetrics], ReleaseSource]

IDLE_BLOCK_MS = 500  # how long an idle worker waits for work before it looks at releases and signals
_LONGEST_PAUSE_SECONDS = 10.0


class SickWorkerError(Exception):
    """The fault lies with this worker and not with an event: whatever it is given fails."""


def require_health(release: ServingRelease, control: Mapping[str, RecentEvents], failure: Exception) -> None:
    """After a failure, make sure that this worker can answer for others.

    Args:
        release: What it serves.
        control: Live events of a user with whom a worker has succeeded lately, if there is one.
        failure: What failed.

    Raises:
        SickWorkerError: It cannot.
    """
    try:
        probe(release, control)
    except Exception as error:
        raise SickWorkerError(f"the probe failed after another failure: {name_error(error)}") from failure


class PatientLoop(ABC):
    """A process that goes step by step until `stop`, and waits while Redis is unavailable."""

    def __init__(self, client: redis.Redis) -> None:
        """Take a client that returns str."""
        self._client = client
        self._stopping = False
        self._pause = 0.0  # seconds; while Redis is unavailable

    def stop(self) -> None:
        """Finish the current step, then return from `run`."""
        self._stopping = True

    @abstractmethod
    def step(self) -> None:
        """One iteration."""

    def _repeat(self) -> None:
        """Step until stopped."""
        while not self._stopping:
            try:
                self.step()
                self._pause = 0.0
            except redis.RedisError as error:
                if not is_unavailable(error):
                    raise
                self._pause = min(_LONGEST_PAUSE_SECONDS, 2 * self._pause or 0.5)
                log.warning("redis is unavailable", error=name_error(error), retry_in_seconds=self._pause)
                self._client.connection_pool.disconnect()  # after a fail-over the address leads elsewhere
                self._sleep(self._pause)

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._stopping and time.monotonic() < deadline:
            time.sleep(0.05)


class ServingLoop(PatientLoop):
    """A process that serves a release; `run` returns after `stop`."""

    def __init__(
        self,
        client: redis.Redis,
        load: Load,
        name: str | None,
        metrics: WorkerMetrics,
        source: MakeSource,
    ) -> None:
        """Take what both kinds have.

        Args:
            client: Returns str.
            load: Loads and checks a release; may raise anything.
            name: That no other worker ever had; that of this process if left out.
            metrics: Those of its kind.
            source: Says which release it serves.
        """
        super().__init__(client)
        self.name = name or name_worker()
        self.metrics = metrics
        self._source = source(client, self.name, load, self.metrics)

    @property
    def loading(self) -> bool:
        """Whether a release is being loaded, which nothing can interrupt."""
        return self._source.loading

    def run(self) -> None:
        """Serve until stopped; wait while Redis is unavailable.

        Raises:
            SickWorkerError: This worker cannot work; it has left, for its supervisor to start another.
            UrmError: There will never be a release to serve.
        """
        log.info("worker started", worker=self.name)
        try:
            self._repeat()
        finally:
            if not self._pause:  # a Redis that is away would cost the rest of the grace; what this worker holds expires
                self._leave()
            self._client.close()
            log.info("worker stopped", worker=self.name)

    @abstractmethod
    def _leave_queue(self) -> None:
        """Unregister this worker from its source of work."""

    def _follow_release(self) -> ServingRelease | None:
        """Send a heartbeat and take a newly loaded release; None while there is none."""
        send_heartbeat(self._client, self.name, self._source.serving.name if self._source.serving else "")
        self._source.poll()
        return self._source.serving

    def _leave(self) -> None:
        try:
            self._leave_queue()
            unregister(self._client, self.name)
        except redis.RedisError as error:
            log.warning("worker not unregistered", error=name_error(error))
