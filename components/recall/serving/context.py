"""A user's context at the newest event: the features as materialised, and the live events since.

Rule for time: "now" is one microsecond after the user's newest event, as for every row of the feature store, never
the clock of the machine; so a replay of old events gives what it would have given then. An event that is older than
the features is taken to be in them; a late event among the live ones falls into its place by its own time.

The result equals the offline history of the same instant, but for two things that the online store does not hold: the
counts behind `top_categories`, and items beyond the history's length; such an item that comes back counts as new. And
it knows no more live events than are kept (`recall.history_events`), and one time of day at which days turn.
"""

from dataclasses import dataclass, field

import numpy as np

from components.recall.state.events import Event
from components.urm.data.request import UserContext

_DAY_US = 86_400_000_000


@dataclass
class HistoryItem:
    """One distinct item of a user's history."""

    count: int
    last_us: int
    behavior: str


@dataclass(frozen=True)
class KnownHistory:
    """What the feature store knows of a user; a user it does not know has the empty one.

    Attributes:
        as_of_us: First instant at which it may be known, microseconds; live events before it are in it.
        items: By item id, newest first.
        num_events: Events in all.
        num_items: Distinct items in all, also those no longer in `items`.
        num_active_days: Days with an event.
        top_categories: The most frequent categories in words.
    """

    as_of_us: int = 0
    items: dict[int, HistoryItem] = field(default_factory=dict)
    num_events: int = 0
    num_items: int = 0
    num_active_days: int = 0
    top_categories: tuple[str, ...] = ()  # the live events do not change them


@dataclass(frozen=True)
class HistoryRule:
    """How the features stage shapes a history; the release's manifest says it.

    Attributes:
        length: Distinct items kept.
        day_origin_us: An instant at which a day begins, microseconds.
    """

    length: int
    day_origin_us: int

    def day(self, ts_us: int) -> int:
        """Number of the day that holds an instant."""
        return (ts_us - self.day_origin_us) // _DAY_US


def build_context(known: KnownHistory, live: list[Event], rule: HistoryRule) -> UserContext:
    """The user's context one microsecond after the newest event.

    Args:
        known: From the feature store.
        live: Recent events without repeats, oldest first.
        rule: How histories are shaped.
    """
    new = [event for event in live if event.ts_us >= known.as_of_us]
    bought = [event for event in new if event.item_id is not None]
    now_us = max([known.as_of_us, *(event.ts_us + 1 for event in new)])
    items = {item_id: HistoryItem(**vars(item)) for item_id, item in known.items.items()}
    for event in bought:
        _add(items, event)
    newest_first = sorted(items.items(), key=_newest_first)[: rule.length]
    last_us = max((item.last_us for item in items.values()), default=now_us)
    return UserContext(
        item_ids=np.array([item_id for item_id, _ in newest_first], dtype=np.int64),
        counts=np.array([item.count for _, item in newest_first], dtype=np.int32),
        days_since=np.array([(now_us - item.last_us) / _DAY_US for _, item in newest_first], dtype=np.float32),
        behaviors=[item.behavior for _, item in newest_first],
        num_events=known.num_events + len(bought),
        num_items=known.num_items + len(items.keys() - known.items.keys()),
        num_active_days=known.num_active_days + _new_days(known, bought, rule),
        days_since_last=(now_us - last_us) / _DAY_US,
        top_categories=known.top_categories,
    )


def latest_query(live: list[Event]) -> str | None:
    """The words of the newest search; events after it leave it as it is, so that no order or batch decides."""
    return next((event.query for event in reversed(live) if event.query), None)


def _add(items: dict[int, HistoryItem], event: Event) -> None:
    item = items.setdefault(int(event.item_id or 0), HistoryItem(count=0, last_us=0, behavior=event.behavior))
    item.count += 1
    if event.ts_us >= item.last_us:
        item.last_us, item.behavior = event.ts_us, event.behavior


def _newest_first(pair: tuple[int, HistoryItem]) -> tuple[int, int, int]:
    """The order of the features stage: items of one instant stand by their counts, then by their ids."""
    item_id, item = pair
    return -item.last_us, -item.count, item_id


def _new_days(known: KnownHistory, bought: list[Event], rule: HistoryRule) -> int:
    """Days with an event that the features do not count yet; their last event lies just before `as_of_us`."""
    days = {rule.day(event.ts_us) for event in bought}
    return len(days - {rule.day(known.as_of_us - 1)} if known.num_events else days)
