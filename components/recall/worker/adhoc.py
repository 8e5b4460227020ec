"""The ad-hoc worker: answers requests that wait for the model, with guidance in words if they have some.

It is a process beside the stream's workers and takes nothing from the stream, so that however many requests come, the
stream's workers keep their own. It follows releases as they do, and a promotion waits for it, too.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import redis
import structlog

from components.config import RecallConfig, Task
from components.memory import trim_memory
from components.recall.serving.context import KnownHistory, build_context
from components.recall.serving.engine import Ranking, ServingRelease
from components.recall.state.adhoc import AdHocOutcome, AdHocQueue, AdHocRefusal, AdHocRequest, AdHocResult
from components.recall.state.events import Event
from components.recall.state.store import UserStore
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.metrics import AdHocMetrics
from components.recall.worker.loop import IDLE_BLOCK_MS, MakeSource, ServingLoop, SickWorkerError, require_health
from components.recall.worker.source import Load
from components.recall.worker.switch import ReleaseSwitch
from components.redis_client import is_unavailable
from components.urm.data.request import RecallRequest, UserContext

log = structlog.get_logger()
REQUESTS_PER_BATCH = 8  # callers wait, so a batch must be short


class AdHocWorker(ServingLoop):
    """One process of the ad-hoc pool; `run` returns after SIGTERM, SIGINT or `stop`."""

    metrics: AdHocMetrics

    def __init__(
        self,
        client: redis.Redis,
        config: RecallConfig,
        load: Load,
        name: str | None = None,
        source: MakeSource = ReleaseSwitch,
    ) -> None:
        """Take what a `RecallWorker` takes."""
        super().__init__(client, load, name, AdHocMetrics(), source)
        self._queue = AdHocQueue(client, self.name, config)
        self._store = UserStore(client, config)

    def step(self) -> None:
        """One iteration: heartbeat, releases, and one batch of requests."""
        release = self._follow_release()
        if release is None:
            self._sleep(IDLE_BLOCK_MS / 1000)
            return
        self._queue.register()
        requests, dropped = self._queue.take(REQUESTS_PER_BATCH, IDLE_BLOCK_MS / 1000)
        self.metrics.requests.labels(outcome="dropped").inc(dropped)
        if requests:
            with self.metrics.stage_seconds.labels(part="ad_hoc").time():
                try:
                    self._process(release, requests)
                except SickWorkerError:
                    self._queue.hand_back()
                    raise
            trim_memory()

    def _process(self, release: ServingRelease, requests: Sequence[AdHocRequest]) -> None:
        """Answer a batch; if the model fails on it, each request alone.

        Raises:
            SickWorkerError: The fault is this worker's.
        """
        tasks = {task.name: task for task in release.tasks}
        refused = {one.request_id: refusal for one in requests if (refusal := _refuse(tasks, one)) is not None}
        rest = [one for one in requests if one.request_id not in refused]
        self._answer(refused, "refused")
        try:
            self._answer(self._infer(release, tasks, rest), "answered")
        except Exception as error:  # one user's data broke the model: the others must not suffer
            if is_unavailable(error):
                raise
            failure = error
        else:
            return
        if len(rest) > 1:
            for one in rest:
                self._process(release, [one])
            return
        require_health(release, {}, failure)
        log.error("ad-hoc request failed", error=name_error(failure), release=release.name)
        self._answer({one.request_id: _FAILED for one in rest}, "failed")

    def _infer(
        self, release: ServingRelease, tasks: Mapping[str, Task], requests: Sequence[AdHocRequest]
    ) -> dict[str, AdHocResult]:
        if not requests:
            return {}
        users = list(dict.fromkeys(one.user_id for one in requests))
        recent = self._store.recent(users)
        erased = self._store.erased([user for user in users if not recent[user].events])
        known = release.read_histories([user for user in users if user not in erased])
        contexts = {
            user: build_context(known.get(user, KnownHistory()), recent[user].events, release.rule) for user in users
        }
        prompts = [_prompt(tasks, one, contexts[one.user_id]) for one in requests]
        rankings = release.recommend(prompts, max(one.k for one in requests))
        return {
            request.request_id: _result(release, request, ranking, recent[request.user_id].events[-1:])
            for request, ranking in zip(requests, rankings, strict=True)
        }

    def _answer(self, answers: Mapping[str, AdHocOutcome], outcome: str) -> None:
        if answers:
            self._queue.answer(answers)
            self.metrics.requests.labels(outcome=outcome).inc(len(answers))

    def _leave_queue(self) -> None:
        self._queue.unregister()


_FAILED = AdHocRefusal(
    status=500,
    subject="ad-hoc recall",
    expected="the model to answer",
    got="an error that is now in the worker's log",
    remedy="report it",
)


def _result(release: ServingRelease, request: AdHocRequest, ranking: Ranking, newest: list[Event]) -> AdHocResult:
    item_ids, scores = ranking
    return AdHocResult(
        item_ids=item_ids[: request.k],
        scores=scores[: request.k],
        release=release.name,
        event_id=newest[0].event_id if newest else None,
        event_ts=newest[0].ts if newest else None,
        computed_at=datetime.now(UTC),
    )


def _prompt(tasks: Mapping[str, Task], request: AdHocRequest, context: UserContext) -> RecallRequest:
    return RecallRequest(context, tasks[request.task], request.query, request.guidance or None)


def _refuse(tasks: Mapping[str, Task], request: AdHocRequest) -> AdHocRefusal | None:
    """What this release cannot answer; the API refuses it first, unless a release switch comes in between."""
    task = tasks.get(request.task)
    if task is None:
        expected, got = "a task of the serving release", repr(request.task)
    elif task.needs_query != bool(request.query):
        expected, got = ("a query" if task.needs_query else "no query"), "none" if task.needs_query else "one"
    else:
        return None
    return AdHocRefusal(
        status=422, subject=f"task {request.task!r}", expected=expected, got=got, remedy="see GET /v1/tasks"
    )
