from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.recall.serving.context import HistoryItem, HistoryRule, KnownHistory, build_context, latest_query
from components.recall.state.events import Event, from_microseconds, to_microseconds

START = datetime(2017, 12, 1, 5, tzinfo=UTC)
RULE = HistoryRule(length=4, day_origin_us=to_microseconds(START))
DAY_US = 86_400_000_000


def event(number: int, item_id: int | None, hours: float, **fields: str) -> Event:
    return Event(event_id=f"e{number}", user_id="u", item_id=item_id, ts=START + timedelta(hours=hours), **fields)


def summarise(events: list[Event]) -> KnownHistory:
    """What the features stage would know after these events, by the plainest code."""
    if not events:
        return KnownHistory()
    ordered = sorted(events, key=lambda one: (one.ts, one.event_id))
    items = {}
    counts = Counter(one.item_id for one in ordered)
    for one in ordered:
        items[one.item_id] = HistoryItem(counts[one.item_id], one.ts_us, one.behavior)
    return KnownHistory(
        as_of_us=ordered[-1].ts_us + 1,
        items=items,
        num_events=len(ordered),
        num_items=len(items),
        num_active_days=len({RULE.day(one.ts_us) for one in ordered}),
    )


def test_new_event_moves_its_item_to_the_front_and_ages_count_to_just_after_it() -> None:
    known = summarise([event(0, 7, 0), event(1, 8, 1)])
    context = build_context(known, [event(2, 7, 25, behavior="view")], RULE)
    assert context.item_ids.tolist() == [7, 8]
    assert context.counts.tolist() == [2, 1]
    assert context.behaviors == ["view", "purchase"]
    assert context.days_since.tolist() == pytest.approx([1e-6 / 86_400, 1.0], rel=1e-6)
    assert (context.num_events, context.num_items, context.num_active_days) == (3, 2, 2)
    assert context.days_since_last == pytest.approx(1 / DAY_US)


def test_event_that_the_features_hold_is_not_counted_twice() -> None:
    events = [event(0, 7, 0), event(1, 8, 1)]
    context = build_context(summarise(events), events, RULE)
    assert context.counts.tolist() == [1, 1]
    assert context.num_events == 2


def test_search_alone_is_no_purchase_but_time_goes_on() -> None:
    context = build_context(summarise([event(0, 7, 0)]), [event(1, None, 24, query="pizza")], RULE)
    assert context.item_ids.tolist() == [7]
    assert context.num_events == 1
    assert context.days_since_last == pytest.approx(1.0, abs=1e-9)


def test_unknown_user_without_features_has_the_live_events_alone() -> None:
    context = build_context(KnownHistory(), [event(0, 7, 0)], RULE)
    assert context.item_ids.tolist() == [7]
    assert (context.num_events, context.num_items, context.num_active_days) == (1, 1, 1)


def test_the_newest_search_counts_whatever_came_after_it() -> None:
    """A batch may hold the search and the click that followed, or a click may overtake its search."""
    search, buy, other = event(0, None, 0, query="pizza"), event(1, 7, 1), event(2, None, 2, query="ham")
    assert latest_query([search]) == latest_query([search, buy]) == "pizza"
    assert latest_query([search, buy, other]) == "ham"
    assert latest_query([buy]) is latest_query([]) is None


LOGS = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 200), st.sampled_from(["purchase", "view"])), min_size=1, max_size=20
)


@given(log=LOGS, known_hours=st.integers(0, 200))
def test_online_history_equals_the_offline_one_wherever_the_features_end(
    log: list[tuple[int, int, str]], known_hours: int
) -> None:
    events = [event(number, item, hours, behavior=kind) for number, (item, hours, kind) in enumerate(log)]
    events.sort(key=lambda one: (one.ts, one.event_id))
    cut = START + timedelta(hours=known_hours)
    known = summarise([one for one in events if one.ts < cut])
    live = [one for one in events if one.ts >= cut]
    online, offline = build_context(known, live, RULE), build_context(summarise(events), [], RULE)
    assert online.item_ids.tolist() == offline.item_ids.tolist()
    assert online.counts.tolist() == offline.counts.tolist()
    assert online.behaviors == offline.behaviors
    assert online.days_since.tolist() == offline.days_since.tolist()
    assert (online.num_events, online.num_items) == (offline.num_events, offline.num_items)
    assert online.num_active_days == offline.num_active_days
    assert len(online.item_ids) <= RULE.length


@given(st.integers(0, 2**52))
def test_microseconds_survive_the_way_to_an_instant_and_back(ts_us: int) -> None:
    assert to_microseconds(from_microseconds(ts_us)) == ts_us
