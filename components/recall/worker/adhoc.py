"""The ad-hoc worker: answers requests that wait for the model, with guidance in words if they have some.

It is a process beside the stream's workers and takes nothing from the stream, so that however many requests come, the
stream's workers keep their own. It follows releases as they do, and a promotion waits for it, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import redis
import structlog

from components.config import RecallConfig, Task
from components.memory import trim_memory
from components.recall.serving.context import KnownHistory, build_context
from components.recall.serving.engine import Ranking, ServingRelease
from components.recall.state.asks import Ask, AskAnswer, AskDesk, AskRefusal, AskResult
from components.recall.state.events import Event
from components.recall.state.store import RecentEvents, UserStore
from components.recall.telemetry.logs import name_error
from components.recall.telemetry.metrics import AdHocMetrics
from components.recall.worker.loop import IDLE_BLOCK_MS, ServingLoop
from components.release.publication import Publication
from components.urm.data.request import RecallRequest, UserContext

log = structlog.get_logger()
ASKS_A_PASS = 8  # callers wait, so a pass is to be short
_NO_EVENTS = RecentEvents(events=[], revision=0)


class AdHocWorker(ServingLoop):
    """One process of the ad-hoc pool; `run` returns after SIGTERM, SIGINT or `stop`."""

    metrics: AdHocMetrics

    def __init__(
        self,
        client: redis.Redis,
        config: RecallConfig,
        load: Callable[[Publication], ServingRelease],
        name: str | None = None,
    ) -> None:
        """Take what a `RecallWorker` takes."""
        super().__init__(client, load, name, AdHocMetrics())
        self._desk = AskDesk(client, self.name, config)
        self._store = UserStore(client, config)

    def step(self) -> None:
        """One turn: heartbeat, releases, and as many requests as one pass of the model takes."""
        release = self._follow_release()
        if release is None:
            self._sleep(IDLE_BLOCK_MS / 1000)
            return
        self._desk.open()
        asks, dropped = self._desk.take(ASKS_A_PASS, IDLE_BLOCK_MS / 1000)
        self.metrics.asks.labels(outcome="dropped").inc(dropped)
        if asks:
            with self.metrics.stage_seconds.labels(part="ad_hoc").time():
                self._process(release, asks)
            trim_memory()

    def _process(self, release: ServingRelease, asks: Sequence[Ask]) -> None:
        """Answer a batch; if the model fails on it, each request alone."""
        tasks = {task.name: task for task in release.tasks}
        refused = {ask.ask_id: refusal for ask in asks if (refusal := _refuse(tasks, ask)) is not None}
        rest = [ask for ask in asks if ask.ask_id not in refused]
        self._answer(refused, "refused")
        try:
            self._answer(self._infer(release, tasks, rest), "answered")
        except redis.RedisError:
            raise
        except Exception as error:  # one user's data broke the model: the others must not suffer
            if len(rest) > 1:
                for ask in rest:
                    self._process(release, [ask])
                return
            log.error("ad-hoc request failed", error=name_error(error), release=release.name)
            self._answer({ask.ask_id: _FAILED for ask in rest}, "failed")

    def _infer(self, release: ServingRelease, tasks: Mapping[str, Task], asks: Sequence[Ask]) -> dict[str, AskResult]:
        if not asks:
            return {}
        users = list(dict.fromkeys(ask.user_id for ask in asks))
        recent = {user: _NO_EVENTS for user in users} | self._store.recent(users)
        known = release.read_histories(users)
        contexts = {
            user: build_context(known.get(user, KnownHistory()), recent[user].events, release.rule) for user in users
        }
        requests = [_request(tasks, ask, contexts[ask.user_id]) for ask in asks]
        rankings = release.recommend(requests, max(ask.k for ask in asks))
        return {
            ask.ask_id: _result(release, ask, ranking, recent[ask.user_id].events[-1:])
            for ask, ranking in zip(asks, rankings, strict=True)
        }

    def _answer(self, answers: Mapping[str, AskAnswer], outcome: str) -> None:
        if answers:
            self._desk.answer(answers)
            self.metrics.asks.labels(outcome=outcome).inc(len(answers))

    def _sign_off(self) -> None:
        self._desk.close()


_FAILED = AskRefusal(
    status=500,
    subject="ad-hoc recall",
    expected="the model to answer",
    got="an error that is now in the worker's log",
    remedy="report it",
)


def _result(release: ServingRelease, ask: Ask, ranking: Ranking, newest: list[Event]) -> AskResult:
    item_ids, scores = ranking
    return AskResult(
        item_ids=item_ids[: ask.k],
        scores=scores[: ask.k],
        release=release.name,
        event_id=newest[0].event_id if newest else None,
        event_ts=newest[0].ts if newest else None,
        computed_at=datetime.now(UTC),
    )


def _request(tasks: Mapping[str, Task], ask: Ask, context: UserContext) -> RecallRequest:
    return RecallRequest(context, tasks[ask.task], ask.query, ask.guidance or None)


def _refuse(tasks: Mapping[str, Task], ask: Ask) -> AskRefusal | None:
    """What this release cannot answer; the API asks no such thing, unless a release switch comes in between."""
    task = tasks.get(ask.task)
    if task is None:
        expected, got = "a task of the serving release", repr(ask.task)
    elif task.needs_query != bool(ask.query):
        expected, got = ("a query" if task.needs_query else "no query"), "none" if task.needs_query else "one"
    else:
        return None
    return AskRefusal(status=422, subject=f"task {ask.task!r}", expected=expected, got=got, remedy="see GET /v1/tasks")
