"""The smoke check of a promotion on a cluster: what serves is asked through the API, as a client would.

Known users: an ad-hoc answer must come from the release and have the items that the release, loaded here from its
bundle, gives for the same history. Then an event of a made-up user must become visible in a result of the release. A
pod of the former release that is still draining may answer first, so each question is asked again for a while.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median
from typing import TypeVar

import redis
import structlog

from components.client import RecallApiError, RecallClient
from components.config import RecallConfig, ReleaseConfig, Task
from components.device import set_threads
from components.exceptions import ConfigError, ReleaseError
from components.recall.serving.context import build_context
from components.recall.serving.engine import ServingRelease, load_release
from components.recall.serving.fetching import fetch_release
from components.recall.state.events import Event
from components.recall.state.scripts import accepted_key, history_keys, result_key, waiting_key
from components.recall.state.store import UserStore
from components.release.bundle import SmokeRequest, read_smoke
from components.release.publication import Publication
from components.settings import Settings
from components.urm.data.request import RecallRequest

log = structlog.get_logger()
MIN_OVERLAP = 0.95  # mean share of the release's own top-K that comes back; rounding differs between devices
_QUESTIONS = 20
_K = 20
_PATIENCE_SECONDS = 60.0
_POLL_SECONDS = 0.5
_FINAL = frozenset({401, 403})  # a token that does not fit today does not fit in a minute
_DIFFER = "see that workers and promotion have one configuration (filters) and one version of the code"
_T = TypeVar("_T")


class _NotYetError(Exception):
    """An answer that another try may better."""


class SmokeCheck:
    """Asks what serves through the recall API; raises where it is not the release."""

    def __init__(
        self,
        settings: Settings,
        config: ReleaseConfig,
        recall: RecallConfig,
        client: redis.Redis,
        patience_seconds: float = _PATIENCE_SECONDS,
    ) -> None:
        """Take the configuration that the workers have, too: filters decide what they answer.

        Raises:
            ConfigError: The API's address is not set.
        """
        if not settings.api_url:
            raise ConfigError(
                "URM_API_URL",
                expected="the address of the recall API",
                got="none",
                remedy="set it to that of its Service",
            )
        self._settings, self._config, self._recall, self._client = settings, config, recall, client
        self._patience = patience_seconds
        self._k = min(_K, recall.k)

    def __call__(self, publication: Publication, ad_hoc: bool) -> Mapping[str, float]:
        """Check a publication.

        Args:
            publication: What must serve.
            ad_hoc: Whether ad-hoc workers run; without them known users are not asked.

        Returns:
            overlap, users, ask_seconds (median), visible_seconds.

        Raises:
            ReleaseError: Something else serves, or its answers differ from the release's own.
        """
        set_threads(self._settings)
        release = load_release(publication, self._settings, self._config, self._recall.filters)
        rows = read_smoke(fetch_release(publication, self._settings).bundle)
        url, token = self._settings.api_url, self._settings.api_token.get_secret_value()
        with RecallClient(url, token, tries=1) as api:
            figures = self._ask_known_users(api, release, rows) if ad_hoc else {}
            figures["visible_seconds"] = self._follow_event(api, release, rows)
        log.info("smoke check passed", release=release.name, **figures)
        return figures

    def _ask_known_users(
        self, api: RecallClient, release: ServingRelease, rows: Sequence[SmokeRequest]
    ) -> dict[str, float]:
        chosen = rows[:: max(1, len(rows) // _QUESTIONS)][:_QUESTIONS]
        tasks = {task.name: task for task in release.tasks}
        seconds, overlaps = [], []
        for row in chosen:
            user, task = str(row.context["user_id"]), tasks[row.task]

            def ask(user: str = user, task: Task = task, query: str | None = row.query) -> tuple[float, float]:
                began = time.monotonic()
                answer = api.ask(user, task=task.name, query=query, k=self._k)
                took = time.monotonic() - began
                items, event_id = self._recall_here(release, user, task, query)
                if (answer.release, answer.event_id) != (release.name, event_id):
                    raise _NotYetError(f"an answer of release {answer.release} with event {answer.event_id}")
                return took, _overlap([item.item_id for item in answer.items], items)

            took, overlap = self._try(f"an ad-hoc answer of release {release.name}", release.name, ask)
            seconds.append(took)
            overlaps.append(overlap)
        shared = mean(overlaps) if overlaps else 0.0
        if shared < MIN_OVERLAP:
            raise _refuse(
                release.name,
                f"at least {MIN_OVERLAP:g} of its own top {self._k} in the answers to {len(chosen)} questions",
                f"{shared:.3f}",
                _DIFFER,
            )
        return {"users": len(chosen), "overlap": round(shared, 4), "ask_seconds": round(median(seconds), 3)}

    def _follow_event(self, api: RecallClient, release: ServingRelease, rows: Sequence[SmokeRequest]) -> float:
        """Send an event of a made-up user, and wait for the result that knows it; seconds until then."""
        user, item = f"urm-smoke-{release.order}", int(release.recaller.candidate_ids[0])
        task = min(release.tasks, key=lambda task: task.needs_query)
        query = None
        if task.needs_query:  # every task is a search, which no event without words asks
            row = next(row for row in rows if row.query)
            task, query = next(task for task in release.tasks if task.name == row.task), row.query
        sent: list[tuple[Event, float]] = []

        def send() -> None:
            event = Event(user_id=user, item_id=item, query=query)
            outcome = api.send([event]).events[0]
            if outcome.status == "refused":
                raise _NotYetError(f"a refusal of the event: {outcome.detail}")
            sent.append((event, time.monotonic()))

        def look() -> float:
            if not sent:
                send()
            answer = api.recall(user, task.name, self._k)
            event, began = sent[-1]
            if answer.source != "model" or answer.event_id != event.event_id:
                raise _NotYetError(f"an answer without that event, of release {answer.release}")
            if answer.release != release.name:  # a pod of the former release took it: another one, for the new pods
                send()
                raise _NotYetError(f"a result of release {answer.release}")
            took = time.monotonic() - began
            overlap = _overlap([row.item_id for row in answer.items], self._recall_here(release, user, task, query)[0])
            if overlap < MIN_OVERLAP:
                raise _refuse(
                    release.name,
                    f"its own top {self._k} in the result of a made-up user",
                    f"a share of {overlap:.3f} of it",
                    _DIFFER,
                )
            return took

        try:
            return round(self._try(f"an event in a result of release {release.name}", release.name, look), 3)
        finally:
            self._forget(user, [event for event, _ in sent], release.tasks)

    def _recall_here(
        self, release: ServingRelease, user: str, task: Task, query: str | None
    ) -> tuple[list[int], str | None]:
        """The release's own items for a user as known now, and the newest live event among what is known."""
        recent = UserStore(self._client, self._recall).recent([user])[user]
        context = build_context(release.read_histories([user])[user], recent.events, release.rule)
        ((items, _),) = release.recommend([RecallRequest(context, task, query)], self._k)
        return items, recent.events[-1].event_id if recent.events else None

    def _try(self, expected: str, name: str, attempt: Callable[[], _T]) -> _T:
        """Try until it works, or patience ends.

        Raises:
            ReleaseError: It does not.
        """
        deadline = time.monotonic() + self._patience
        while True:
            try:
                return attempt()
            except (_NotYetError, RecallApiError) as error:
                final = isinstance(error, RecallApiError) and error.status in _FINAL
                if final or time.monotonic() > deadline:
                    within = f"{expected} within {self._patience:g} s"
                    raise _refuse(name, within, error, "look at the logs of API and workers") from None
            time.sleep(_POLL_SECONDS)

    def _forget(self, user: str, events: Sequence[Event], tasks: Sequence[Task]) -> None:
        """Delete what the made-up user left."""
        marks = [accepted_key(user, event.event_id) for event in events]
        results = [result_key(user, task.name) for task in tasks]
        self._client.unlink(*history_keys(user), waiting_key(user), *marks, *results)


def _overlap(answered: Sequence[int], own: Sequence[int]) -> float:
    return len({*answered} & {*own}) / len(own) if own else float(not answered)


def _refuse(name: str, expected: str, got: object, remedy: str) -> ReleaseError:
    return ReleaseError(f"smoke check of release {name}", expected=expected, got=got, remedy=remedy)
