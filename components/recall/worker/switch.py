"""Release switch of one worker: load the wanted release beside the serving one, check it, flip or refuse it.

A flip falls between two batches. What is no longer wanted by then is dropped.

What was refused is not tried again, unless the worker has nothing to serve: the fault may have been a moment's. When
Redis has lost its newest writes, the worker goes back to what is wanted now, and says again what it serves.
"""

import time
from concurrent.futures import Future

import redis
import structlog

from components.exceptions import UrmError
from components.memory import trim_memory
from components.recall.serving.engine import ServingRelease
from components.recall.telemetry.metrics import WorkerMetrics
from components.recall.worker.source import Load, ReleaseSource
from components.release.publication import SERVING, WANTED, Answer, Publication, answer, read_publication, serve

log = structlog.get_logger()
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 5.0, 60.0


class ReleaseSwitch(ReleaseSource):
    """Follows the wanted release."""

    def __init__(self, client: redis.Redis, worker: str, load: Load, metrics: WorkerMetrics) -> None:
        """Take what a `ReleaseSource` takes."""
        super().__init__(client, worker, load, metrics)
        self._target: Publication | None = None
        self._wanted: Publication | None = None
        self._considered: set[Publication] = set()  # since that is wanted
        self._pause, self._again_at = _FIRST_PAUSE_SECONDS, 0.0

    def poll(self) -> None:
        """Start loading what is newly wanted, or flip to what has been loaded; never waits, never gives up."""
        if self._loading is not None:
            if self._loading.done():
                self._finish(self._loading)
                self._loading = None
            return
        wanted, serving = read_publication(self._client, WANTED), read_publication(self._client, SERVING)
        target = self._choose(wanted, serving)
        if target is None:
            if self.serving is not None and (serving is None or serving.order < self.serving.order):
                serve(self._client, self.serving.publication)  # Redis has forgotten it
            return
        self._target, self._started = target, time.monotonic()
        if self.serving is not None and self.serving.same_bundle(target):
            self._accept(self.serving.republished(target))
        else:
            self._start_loading(target)

    def _choose(self, wanted: Publication | None, serving: Publication | None) -> Publication | None:
        """The wanted release if it is new; a fresh worker that refused it takes what the others serve."""
        if wanted != self._wanted:
            self._wanted = wanted
            self._considered.clear()
        elif self.serving is None and self._considered and time.monotonic() > self._again_at:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            self._considered.clear()
        for publication in [wanted] if self.serving is not None else [wanted, serving]:
            if publication is not None and publication not in self._considered:
                return publication
        return None

    def _finish(self, loading: Future[ServingRelease]) -> None:
        trim_memory()
        error = loading.exception()
        if error is None:
            self._accept(loading.result())
        else:  # whatever a bundle makes the loader raise, the old release goes on serving
            self._refuse(str(error) if isinstance(error, UrmError) else f"{type(error).__name__}: {error}")

    def _accept(self, release: ServingRelease) -> None:
        if not self._tell(release.publication, Answer(outcome="serving", seconds=self._seconds())):
            log.info("release is no longer wanted", release=release.name, order=release.order)
            return
        self._take(release)

    def _refuse(self, reason: str) -> None:
        if self._target is not None:
            still = self.serving.name if self.serving else "none"
            log.error("release rejected", release=self._target.release, reason=reason, still_serving=still)
            self._tell(self._target, Answer(outcome="rejected", reason=reason, seconds=self._seconds()))
            self._again_at = time.monotonic() + self._pause

    def _tell(self, publication: Publication, given: Answer) -> bool:
        """Answer a publication; whether that counts."""
        counts = answer(self._client, publication, self._worker, given)
        if counts:
            self._metrics.switches.labels(outcome=given.outcome).inc()
        self._considered.add(publication)
        return counts
