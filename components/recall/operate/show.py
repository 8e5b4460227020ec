"""Tables for a person: one user's recall, stored (`urm recall show`) or fresh (`ask`), and how far a back-fill is."""

from datetime import UTC, datetime

import redis
from rich.table import Table

from components.config import RecallConfig
from components.exceptions import ConfigError, DataError, UnavailableError
from components.recall.operate.terminal import make_table, show
from components.recall.serving.catalogue import Catalogue, load_catalogue
from components.recall.state.adhoc import AdHocRequest, request_and_wait
from components.recall.state.backfill import read_progress
from components.recall.state.events import Event
from components.recall.state.store import UserStore
from components.release.publication import SERVING, Publication, read_publication
from components.settings import Settings


def describe_user(
    client: redis.Redis, settings: Settings, config: RecallConfig, user_id: str, task: str | None, k: int
) -> Table:
    """A table with the user's live events, newest first, beside the recalled items, best first.

    The task is the release's first if none is named.

    Raises:
        UnavailableError: No release is serving.
        ConfigError: The release has no such task.
        DataError: The user has no result.
    """
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
    event = f"event {result.event_id}" if result.event_id else "no live event"
    title = show(f"User {user_id}, {task}: release {result.release}, {event}, computed {at}")
    table = make_table("", "item", "recalled", "score", "live events, newest first", title=title)
    for row, (item_id, score) in enumerate(zip(result.item_ids[:k], result.scores[:k], strict=True)):
        live = events[row] if row < len(events) else ""
        table.add_row(str(row + 1), *map(show, _name(item_id, catalogue)), f"{score:.3f}", show(live))
    return table


def ask_model(client: redis.Redis, settings: Settings, config: RecallConfig, request: AdHocRequest) -> Table:
    """A table of what the model recalls now, best first; a request without a task is one for the release's first.

    Raises:
        UnavailableError: No release is serving, or there is no answer.
    """
    catalogue = _read_catalogue(client, settings)
    request = request.model_copy(update={"task": request.task or catalogue.tasks[0]})
    result = request_and_wait(client, request, config)
    steered = f", “{request.guidance}”" if request.guidance else ""
    title = show(f"User {request.user_id}, {request.task}{steered}: release {result.release}")
    table = make_table("", "item", "recalled", "category", "score", title=title)
    for row, (item_id, score) in enumerate(zip(result.item_ids, result.scores, strict=True)):
        texts = (*_name(item_id, catalogue), " > ".join(catalogue.describe(item_id).category))
        table.add_row(str(row + 1), *map(show, texts), f"{score:.3f}")
    return table


def describe_backfill(client: redis.Redis) -> Table:
    """A table of the shards that have begun to fill the serving release.

    Raises:
        UnavailableError: No release is serving.
    """
    publication = _read_serving(client)
    columns = ("shard", "state", "done", "of", "stored", "current", "forgotten", "failed", "users/s", "noted at")
    table = make_table(*columns, title=show(f"Back-fill of release {publication.release}"))
    for one in read_progress(client, publication.order):
        state = "finished" if one.finished else "waits for live events" if one.waiting else "begun"
        counts = (one.done, one.total, one.stored, one.current, one.forgotten, one.failed)
        at = datetime.fromtimestamp(one.at, UTC).isoformat(timespec="seconds")
        table.add_row(f"{one.shard}/{one.shards}", state, *map(str, counts), f"{one.users_per_second:.1f}", at)
    return table


def _read_serving(client: redis.Redis) -> Publication:
    publication = read_publication(client, SERVING)
    if publication is None:
        raise UnavailableError(
            "recall", expected="a serving release", got="none yet", remedy="run `urm promote` with a worker running"
        )
    return publication


def _read_catalogue(client: redis.Redis, settings: Settings) -> Catalogue:
    return load_catalogue(_read_serving(client), settings)


def _say(event: Event, catalogue: Catalogue) -> str:
    item = () if event.item_id is None else _name(event.item_id, catalogue)
    words = (f"“{event.query}”",) if event.query else ()
    return " ".join((f"{event.ts:%Y-%m-%d %H:%M}", event.behavior, *filter(None, item), *words))


def _name(item_id: int, catalogue: Catalogue) -> tuple[str, str]:
    """The shop's own id and the title; of an item that the release does not know, its number alone."""
    item = catalogue.describe(item_id)
    return item.external_id or str(item_id), item.title or ""
