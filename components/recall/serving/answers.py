"""From users with recent events to results by task, in one pass of the model."""

from collections.abc import Mapping
from datetime import UTC, datetime

from components.recall.serving.context import KnownHistory, build_context, latest_query
from components.recall.serving.engine import ServingRelease
from components.recall.state.events import Event, from_microseconds
from components.recall.state.store import RecentEvents, Result
from components.urm.data.request import RecallRequest


def answer_users(
    release: ServingRelease, known: Mapping[str, KnownHistory], recent: Mapping[str, RecentEvents], k: int
) -> dict[str, dict[str, Result]]:
    """Results of every task, for every user at once.

    Tasks that need a query are answered by the newest search among the live events, and only if there is one.

    Args:
        release: What to compute with.
        known: Features by user; a user left out is new.
        recent: Live events by user, who may have none.
        k: Items per result.

    Returns:
        User → task → result.
    """
    asked = {user: _requests(release, known.get(user, KnownHistory()), events) for user, events in recent.items()}
    flat = [request for requests in asked.values() for request in requests]
    ranked = iter(release.recommend(flat, k))
    computed_at = datetime.now(UTC)
    results: dict[str, dict[str, Result]] = {}
    for user, requests in asked.items():
        newest = recent[user].events[-1] if recent[user].events else None
        results[user] = {}
        for request in requests:
            item_ids, scores = next(ranked)
            results[user][request.task.name] = Result(
                item_ids=item_ids,
                scores=scores,
                release=release.name,
                event_id=newest.event_id if newest else None,
                event_ts=from_microseconds(newest.ts_us) if newest else None,
                computed_at=computed_at,
                query=request.query,
            )
    return results


def probe(release: ServingRelease, control: Mapping[str, RecentEvents]) -> None:
    """Answer for a made-up user and a known one, from feature store to index; raises what a sick worker raises.

    Args:
        release: What to compute with.
        control: Live events of a user with whom a worker has succeeded lately, if there is one.
    """
    event = Event(user_id="urm-probe", item_id=int(release.recaller.candidate_ids[0]))
    known = {user: events for user, events in control.items() if events.events}
    recent = known | {event.user_id: RecentEvents([event])}
    answer_users(release, release.read_histories(list(recent)), recent, k=1)


def _requests(release: ServingRelease, known: KnownHistory, recent: RecentEvents) -> list[RecallRequest]:
    """One request per task, all of the same context object, so that its prefix is computed once."""
    context = build_context(known, recent.events, release.rule)
    query = latest_query(recent.events)
    return [
        RecallRequest(context, task, query if task.needs_query else None)
        for task in release.tasks
        if query or not task.needs_query
    ]
