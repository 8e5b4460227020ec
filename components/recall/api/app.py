"""The recall API: events in, recalled items out of the result store. Reads never touch a model.

A user without a result gets the task's popular items, marked `source: fallback`; so does a user nobody has seen,
because in retail new users are the normal case and not an error.
"""

# No `from __future__ import annotations`: FastAPI must see the bounds that come from the configuration as values.
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from fastapi import Body, Depends, FastAPI, Path, Query, Request, Response
from fastapi_offline import FastAPIOffline
from pydantic import Discriminator, Field, Tag, ValidationError, WrapValidator
from starlette.convertors import PathConvertor, register_url_convertor

from components import __version__
from components.config import RecallConfig
from components.exceptions import UrmError
from components.recall.api import outcomes, problems, requests
from components.recall.api.gateway import Gateway
from components.recall.api.problems import ApiError
from components.recall.api.requests import RateLimit, bearer
from components.recall.api.responses import (
    AdHocAnswer,
    AdHocQuestion,
    EventLineage,
    EventOutcomes,
    Health,
    ListedEvent,
    RecallAnswer,
    RecallAnswers,
    RecalledItem,
    TaskList,
)
from components.recall.api.tokens import Tokens
from components.recall.serving.catalogue import Catalogue
from components.recall.state.adhoc import AdHocRequest, AdHocResult
from components.recall.state.events import EXAMPLE, Event, Number, ShortText
from components.recall.state.store import Result
from components.recall.telemetry.metrics import ApiMetrics
from components.recall.telemetry.tracing import Tracing
from components.settings import Settings

MAX_EVENTS_PER_REQUEST = 1000
MAX_USERS_PER_REQUEST = 200
_Answer = TypeVar("_Answer", bound=RecallAnswer)
_DESCRIPTION = """
Post what users do; read what the model recalls for them.

1. `POST /v1/events` puts events into a stream and answers at once.
2. A worker infers the user's new recall for every task, usually within seconds.
3. `GET /v1/users/{user_id}/recall` reads the stored result; it never waits for the model.
4. `POST /v1/recall` does wait for the model: one user, steered by words, where ad-hoc workers run.

Every error is an `application/problem+json` document whose `detail` says what was expected, what came and what to do.
"""
_EVENT_EXAMPLES = {
    "purchase": {"summary": "A purchase", "value": EXAMPLE},
    "search": {
        "summary": "A search; asks the tasks that need a query",
        "value": {"user_id": "1", "behavior": "search", "query": "frozen pizza", "ts": "2017-12-18T17:06:00Z"},
    },
    "batch": {
        "summary": "Two events at once",
        "value": [EXAMPLE, {**EXAMPLE, "event_id": "basket-17-line-2", "external_id": "981760"}],
    },
}


class TextConvertor(PathConvertor):
    """Any text as a part of a path, with slashes (they are decoded before a route is looked for) and line breaks."""

    regex = "(?s:.*)"


register_url_convertor("text", TextConvertor())


def _keep_error(value: object, validate: Callable[[object], ListedEvent]) -> ListedEvent | ValidationError:
    try:
        return validate(value)
    except ValidationError as error:  # the others of its list are accepted all the same
        return error


# Told apart by shape, so that an error speaks of what was sent and not of the other form.
_ListedEvent = Annotated[ListedEvent, WrapValidator(_keep_error)]
EventOrEvents = Annotated[
    Annotated[Event, Tag("event")]
    | Annotated[list[_ListedEvent], Tag("events"), Field(min_length=1, max_length=MAX_EVENTS_PER_REQUEST)],
    Discriminator(lambda body: "events" if isinstance(body, list) else "event"),
]


def create_app(settings: Settings, config: RecallConfig, tracing: Tracing | None = None) -> FastAPI:
    """The application; it needs Redis only when it is asked something, and makes spans where it is told to."""
    tracing = tracing or Tracing()
    gateway = Gateway(settings, config, tracing)
    metrics = ApiMetrics()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        try:
            await gateway.check()
            yield
        except UrmError as error:
            app.state.failure = error  # the server says only that it cannot start
            raise
        finally:
            await gateway.close()

    app = FastAPIOffline(
        title="URM recall",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # it would lead to whatever host the request names
        generate_unique_id_function=lambda route: route.name,  # operation ids are names of functions here
        openapi_tags=[{"name": "recall"}, {"name": "service"}],
    )
    problems.install(app, gateway.reconnect)
    requests.install(app, metrics, Tokens(settings.api_tokens_file) if settings.api_tokens_file else None)
    limit = RateLimit(gateway.connections, config.requests_per_minute)
    _add_events(app, gateway, config, metrics, limit, tracing.dependencies())
    _add_recall(app, gateway, config, metrics, limit)
    _add_ad_hoc(app, gateway, config, metrics, limit)
    _add_service(app, gateway)
    app.state.metrics = metrics  # served on a port of its own
    app.state.failure = None
    return app


def _add_events(
    app: FastAPI,
    gateway: Gateway,
    config: RecallConfig,
    metrics: ApiMetrics,
    limit: RateLimit,
    dependencies: list[Any],
) -> None:
    @app.post(
        "/v1/events",
        status_code=202,
        tags=["recall"],
        dependencies=[Depends(bearer), *dependencies],
        responses={
            207: {"model": EventOutcomes, "description": "Some events of a list were refused, each says why."},
            **problems.responses(400, 401, 403, 409, 413, 422, 429, 503),
        },
    )
    async def post_events(
        events: Annotated[EventOrEvents, Body(openapi_examples=_EVENT_EXAMPLES)], request: Request, response: Response
    ) -> EventOutcomes:
        """Accept one event or a list of up to 1,000.

        Sending an event again is harmless: its `event_id` is accepted once per user. An event of a list that is refused
        leaves the others alone: the answer is then 207, with Retry-After if the stream is full. If none is taken, the
        answer is a problem.
        """
        batch = events if isinstance(events, list) else [events]
        await limit.count(request, len(batch))
        refusals = {
            number: error for number, event in enumerate(batch) if (error := outcomes.refuse(number, event, config))
        }
        good = [number for number in range(len(batch)) if number not in refusals]
        answers = dict(zip(good, await gateway.accept([batch[number] for number in good]), strict=True))
        for number, answer in answers.items():
            if answer < 0:
                refusals[number] = outcomes.refuse_answer(batch[number], answer, config)
        counts = Counter(answers.values())
        for answer, outcome in outcomes.OUTCOMES.items():
            metrics.events.labels(outcome=outcome).inc(counts[answer])
        metrics.events.labels(outcome="invalid").inc(len(batch) - len(good))
        if len(refusals) == len(batch):
            raise outcomes.merge(refusals, batch)
        if refusals:
            response.status_code = 207
        if counts[-1] or counts[-2]:
            response.headers["Retry-After"] = str(problems.RETRY_AFTER_SECONDS)
        return EventOutcomes(
            accepted=counts[1],
            duplicates=counts[0],
            refused=len(refusals),
            events=[
                outcomes.describe(event, answers.get(number), refusals.get(number))
                for number, event in enumerate(batch)
            ],
        )


def _add_recall(app: FastAPI, gateway: Gateway, config: RecallConfig, metrics: ApiMetrics, limit: RateLimit) -> None:
    readers = [Depends(limit.count_request)]

    task_query = Query(description="A task of the serving release, its first if left out; `GET /v1/tasks` lists them.")
    # The limit is the configuration's, so it is no annotation: those are read without this function's variables.
    k_query = Query(default=min(20, config.k), ge=1, le=config.k, description="Number of items.")

    async def read(user_ids: list[str], task: str | None, k: int) -> list[RecallAnswer]:
        catalogue, task, results = await gateway.results(user_ids, task)
        _require_task(catalogue, task)
        answers = []
        for user_id, result in zip(user_ids, results, strict=True):
            metrics.reads.labels(source="fallback" if result is None else "model", task=task).inc()
            if result is None:
                answers.append(_fallback(user_id, task, k, catalogue))
            else:
                metrics.result_age.observe((datetime.now(UTC) - result.computed_at).total_seconds())
                answers.append(_answer(RecallAnswer, user_id, task, k, catalogue, result, query=result.query))
        return answers

    @app.get(
        "/v1/users/{user_id:text}/recall",
        tags=["recall"],
        dependencies=readers,
        responses=problems.responses(401, 403, 404, 422, 429, 503),
    )
    async def get_recall(
        user_id: Annotated[ShortText, Path(examples=["1"])],
        task: Annotated[ShortText | None, task_query] = None,
        k: int = k_query,
    ) -> RecallAnswer:
        """The items recalled for a user, best first.

        A user without a result, also one never seen before, gets the task's popular items with `source: fallback`.
        An id may be any text, percent-encoded: that of `a/b` is `a%2Fb`.
        """
        return (await read([user_id], task, k))[0]

    @app.get(
        "/v1/events/{event_id:text}",
        tags=["recall"],
        dependencies=readers,
        responses=problems.responses(401, 403, 404, 422, 429, 503),
    )
    async def get_event(
        event_id: Annotated[ShortText, Path(examples=["basket-17-line-2"])],
        user_id: Annotated[ShortText, Query(description="The event's user: ids of events are unique per user.")],
    ) -> EventLineage:
        """What became of an event: waiting, done (when, by which release, in which results) or given up."""
        return await gateway.lineage(user_id, event_id)

    @app.post(
        "/v1/events/lineage",
        tags=["recall"],
        dependencies=readers,
        responses=problems.responses(400, 401, 403, 404, 413, 422, 429, 503),
    )
    async def read_event(
        event_id: Annotated[ShortText, Body(examples=["basket-17-line-2"])],
        user_id: Annotated[ShortText, Body(examples=["1"])],
    ) -> EventLineage:
        """What became of an event, as `GET` answers it, with no id in the address."""
        return await gateway.lineage(user_id, event_id)

    @app.post(
        "/v1/users/recall",
        tags=["recall"],
        dependencies=readers,
        responses=problems.responses(400, 401, 403, 404, 413, 422, 429, 503),
    )
    async def read_recall(
        user_ids: Annotated[
            list[ShortText],
            Body(embed=True, min_length=1, max_length=MAX_USERS_PER_REQUEST, examples=[["1", "2"]]),
        ],
        task: Annotated[ShortText | None, task_query] = None,
        k: int = k_query,
    ) -> RecallAnswers:
        """The items recalled for up to 200 users, in one round trip to the store; each as `GET` would answer."""
        return RecallAnswers(answers=await read(user_ids, task, k))

    @app.get("/v1/tasks", tags=["recall"], dependencies=readers, responses=problems.responses(401, 403, 429, 503))
    async def get_tasks() -> TaskList:
        """The tasks of the serving release."""
        catalogue = await gateway.catalogue()
        return TaskList(release=catalogue.release, tasks=list(catalogue.tasks), query_tasks=list(catalogue.query_tasks))


def _add_ad_hoc(app: FastAPI, gateway: Gateway, config: RecallConfig, metrics: ApiMetrics, limit: RateLimit) -> None:
    class AdHocBody(AdHocQuestion):
        """What to recall for whom, now."""

        k: Number = Field(default=min(20, config.k), ge=1, le=config.k, description="Number of items.")

    @app.post(
        "/v1/recall",
        tags=["recall"],
        dependencies=[Depends(limit.count_request)],
        responses=problems.responses(400, 401, 403, 404, 413, 422, 429, 500, 503, 504),
    )
    async def ask_recall(request: AdHocBody) -> AdHocAnswer:
        """Run the model for one user now, steered by words such as "gift for a child".

        It takes as long as the model does, and nothing is stored: read stored results wherever they do. Requests have
        their own workers and a short queue. A full queue is 429, no worker 503, no answer by the deadline 504.
        """
        catalogue = await gateway.catalogue()
        task = request.task or catalogue.tasks[0]
        _require_task(catalogue, task)
        _require_query(catalogue, task, request.query)
        try:
            result = await gateway.ask(AdHocRequest(**request.model_dump(exclude={"task"}), task=task))
        except ApiError as error:
            metrics.ad_hoc.labels(status=str(error.status)).inc()
            raise
        metrics.ad_hoc.labels(status="200").inc()
        words = {"query": request.query, "guidance": request.guidance}
        return _answer(AdHocAnswer, request.user_id, task, request.k, catalogue, result, **words)


def _add_service(app: FastAPI, gateway: Gateway) -> None:
    @app.get("/healthz", tags=["service"])
    async def get_health() -> Health:
        """The process answers."""
        return Health(status="ok")

    @app.get("/readyz", tags=["service"], responses=problems.responses(503))
    async def get_readiness() -> Health:
        """Redis answers and a release is serving; reads then work, whether or not a worker is alive."""
        catalogue = await gateway.catalogue()
        return Health(status="ok", release=catalogue.release, workers=await gateway.count_workers())

    @app.get("/readyz/intake", tags=["service"], responses=problems.responses(503))
    async def get_intake_readiness() -> Health:
        """Redis answers, so that events are taken or refused with a reason; a release need not be serving."""
        await gateway.check_intake()
        return Health(status="ok")


def _require_task(catalogue: Catalogue, task: str) -> None:
    if task not in catalogue.tasks:
        raise ApiError(
            "unknown-task",
            "task",
            expected="one of " + ", ".join(catalogue.tasks),
            got=repr(task),
            remedy="name a task of the serving release",
        )


def _require_query(catalogue: Catalogue, task: str, query: str | None) -> None:
    needed = task in catalogue.query_tasks
    if needed != (query is not None):
        raise ApiError(
            "invalid-request",
            f"body field 'query', task {task!r}",
            expected="the words that the user searched for" if needed else "nothing, since this task has no query",
            got=repr(query) if query else "nothing",
            remedy="send them" if needed else "leave it out, or put the words into guidance",
        )


def _answer(
    kind: type[_Answer],
    user_id: str,
    task: str,
    k: int,
    catalogue: Catalogue,
    result: Result | AdHocResult,
    **more: Any,
) -> _Answer:
    return kind(
        user_id=user_id,
        task=task,
        source="model",
        release=result.release,
        event_id=result.event_id,
        event_ts=result.event_ts,
        computed_at=result.computed_at,
        items=_items(catalogue, result.item_ids[:k], result.scores[:k]),
        **more,
    )


def _fallback(user_id: str, task: str, k: int, catalogue: Catalogue) -> RecallAnswer:
    item_ids, scores = catalogue.fallback[task]
    return RecallAnswer(
        user_id=user_id,
        task=task,
        source="fallback",
        release=catalogue.release,
        event_id=None,
        event_ts=None,
        computed_at=None,
        query=None,
        items=_items(catalogue, item_ids[:k], scores[:k]),
    )


def _items(catalogue: Catalogue, item_ids: list[int], scores: list[float]) -> list[RecalledItem]:
    items = []
    for item_id, score in zip(item_ids, scores, strict=True):
        items.append(RecalledItem(item_id=item_id, score=score, **catalogue.describe(item_id)._asdict()))
    return items
