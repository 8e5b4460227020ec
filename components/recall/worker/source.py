"""Which release a worker serves: the one that promotions ask for (`switch.py`), or the one of its pod (`fixed.py`)."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import redis
import structlog

from components.recall.serving.engine import ServingRelease
from components.recall.telemetry.metrics import WorkerMetrics
from components.release.publication import Publication

log = structlog.get_logger()
Load = Callable[[Publication], ServingRelease]


class ReleaseSource(ABC):
    """The release that one worker serves.

    Loading happens in a thread; the worker goes on with what it has and calls `poll` between batches, so that no result
    mixes two releases.

    Attributes:
        serving: What results are computed with; None until a first release has passed its check.
    """

    def __init__(self, client: redis.Redis, worker: str, load: Load, metrics: WorkerMetrics) -> None:
        """Take a Redis client that returns str, the worker's name, the loader of releases, the worker's metrics."""
        self.serving: ServingRelease | None = None
        self._client = client
        self._worker = worker
        self._load = load
        self._metrics = metrics
        self._loading: Future[ServingRelease] | None = None
        self._started = 0.0

    @property
    def loading(self) -> bool:
        """Whether a release is being loaded."""
        return self._loading is not None

    @abstractmethod
    def poll(self) -> None:
        """Start loading, or take what has been loaded; never waits.

        Raises:
            UrmError: There will never be a release to serve.
        """

    def _start_loading(self, target: Publication) -> None:
        log.info("loading release", release=target.release, order=target.order)
        self._started = time.monotonic()
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="release")
        self._loading = pool.submit(self._load, target)
        pool.shutdown(wait=False)  # its thread ends with this work: torch keeps 30 MiB of buffers for each that lives

    def _take(self, release: ServingRelease) -> None:
        if self.serving is not None:
            self._metrics.release.labels(release=self.serving.name).set(0)
        self.serving = release
        self._metrics.release.labels(release=release.name).set(1)
        self._metrics.release_created.set(release.created_at)
        self._metrics.features_until.set(release.features_until)
        log.info("serving release", release=release.name, order=release.order, seconds=self._seconds())

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)
