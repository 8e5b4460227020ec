"""One user's recall as a table: the stored one for `urm recall show`, a fresh one for `urm recall ask`."""

import redis
from rich.table import Table

from components.config import RecallConfig
from components.exceptions import ConfigError, DataError, UnavailableError
from components.recall.operate.terminal import show
from components.recall.serving.catalogue import Catalogue, load_catalogue
from components.recall.state.adhoc import AdHocRequest, request_and_wait
from components.recall.state.events import Event
from components.recall.state.store import UserStore
from components.redis_client import open_redis
from components.release.publication import SERVING, read_publication
from components.settings import Settings


def describe_user(settings: Settings, config: RecallConfig, user_id: str, task: str | None, k: int) -> Table:
    """A table with the user's live events, newest first, beside the recalled items, best first.

    The task is the release's first if none is named.

    Raises:
        UnavailableError: No release is serving.
        ConfigError: The release has no such task.
        DataError: The user has no result.
    """
    client = open_redis(settings.redis_url)
    catalogue = _read_catalogue(client, settings)
    task = task or catalogue.tasks[0]
    if task not in catalogue.tasks:
        raise ConfigError(
            "task", expected="one of " + ", ".join(catalogue.tasks), got=repr(task), remedy="name a known task"
        )
    store = UserStore(client, config)
    result = store.result(user_id, task)
    if result is None:
        raise DataError(
            f"user {user_id!r}",
            expected=f"a stored result for task {task!r}",
            got="none",
            remedy="post an event of the user first, for text_query one with a query; the API answers the fallback",
        )
    events = [_say(event, catalogue) for event in reversed(store.recent([user_id])[user_id].events)]
    at = result.computed_at.isoformat(timespec="seconds")
    table = Table(
        title=show(f"User {user_id}, {task}: release {result.release}, event {result.event_id}, computed {at}"),
        title_justify="left",
    )
    for column in ("", "recalled", "score", "live events, newest first"):
        table.add_column(column)
    for row, (item_id, score) in enumerate(zip(result.item_ids[:k], result.scores[:k], strict=True)):
        event = events[row] if row < len(events) else ""
        name = show(catalogue.describe(item_id)[0] or str(item_id))
        table.add_row(str(row + 1), name, f"{score:.3f}", show(event))
    return table


def ask_model(settings: Settings, config: RecallConfig, request: AdHocRequest) -> Table:
    """A table of what the model recalls now, best first; a request without a task is one for the release's first.

    Raises:
        UnavailableError: No release is serving, or there is no answer.
    """
    client = open_redis(settings.redis_url)
    catalogue = _read_catalogue(client, settings)
    request = request.model_copy(update={"task": request.task or catalogue.tasks[0]})
    result = request_and_wait(client, request, config)
    steered = f", “{request.guidance}”" if request.guidance else ""
    title = show(f"User {request.user_id}, {request.task}{steered}: release {result.release}")
    table = Table(title=title, title_justify="left")
    for column in ("", "recalled", "category", "score"):
        table.add_column(column)
    for row, (item_id, score) in enumerate(zip(result.item_ids, result.scores, strict=True)):
        name, category = catalogue.describe(item_id)
        table.add_row(str(row + 1), show(name or str(item_id)), show(" > ".join(category)), f"{score:.3f}")
    return table


def _read_catalogue(client: redis.Redis, settings: Settings) -> Catalogue:
    publication = read_publication(client, SERVING)
    if publication is None:
        raise UnavailableError(
            "recall", expected="a serving release", got="none yet", remedy="run `urm promote` with a worker running"
        )
    return load_catalogue(publication, settings)


def _say(event: Event, catalogue: Catalogue) -> str:
    item = "" if event.item_id is None else catalogue.describe(event.item_id)[0] or str(event.item_id)
    words = f"“{event.query}”" if event.query else ""
    return f"{event.ts:%Y-%m-%d %H:%M} {event.behavior} {item} {words}".strip()
