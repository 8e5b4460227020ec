"""The one release of a pod: its template names it, so that the Deployment's revision is what serves (ADR 23).

There is no second try: a release that cannot be loaded ends the process, and the pod says why.
"""

import time
from concurrent.futures import Future

import redis

from components.exceptions import ReleaseError, UrmError
from components.memory import trim_memory
from components.recall.serving.engine import ServingRelease
from components.recall.telemetry.metrics import WorkerMetrics
from components.recall.worker.source import Load, ReleaseSource
from components.release.publication import Publication, serve_unless_served

_CHECK_SECONDS = 5.0  # between two looks at what the API takes for the serving release


class FixedRelease(ReleaseSource):
    """Loads its release once and serves it until the process ends; serves nothing if it has none."""

    def __init__(
        self,
        publication: Publication | None,
        client: redis.Redis,
        worker: str,
        load: Load,
        metrics: WorkerMetrics,
        announces: bool = True,
    ) -> None:
        """Take the release, none before the first promotion, and what a `ReleaseSource` takes.

        `announces` says whether the API is told. Only workers of the event stream do: a rollout may get as far as the
        ad-hoc workers and fail at these, whose results the API shows.
        """
        super().__init__(client, worker, load, metrics)
        self._publication = publication
        self._announces = announces
        self._next_check = 0.0

    def poll(self) -> None:
        """See ReleaseSource."""
        if self._publication is None:
            return
        if self._loading is not None:
            if self._loading.done():
                self._finish(self._loading, self._publication)
                self._loading = None
        elif self.serving is None:
            self._start_loading(self._publication)
        elif self._announces and time.monotonic() >= self._next_check:  # a heartbeat has named the release by now
            serve_unless_served(self._client, self._publication)
            self._next_check = time.monotonic() + _CHECK_SECONDS

    def _finish(self, loading: Future[ServingRelease], publication: Publication) -> None:
        trim_memory()
        try:
            release = loading.result()
        except UrmError:
            raise
        except Exception as error:  # whatever a bundle makes the loader raise
            raise ReleaseError(
                f"release {publication.release}",
                expected="one that loads and passes its smoke check",
                got=f"{type(error).__name__}: {error}",
                remedy="build the release again, or go back to one that serves",
            ) from error
        self._metrics.switches.labels(outcome="serving").inc()
        self._take(release)
