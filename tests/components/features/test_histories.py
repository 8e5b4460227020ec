from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import ibis.expr.types as ir

from components.features.histories import behavior_sequence, select_rows, user_statistics
from tests.worlds.logs import START, Event

DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)


def microseconds(moment: datetime) -> int:
    return round(moment.timestamp() * 1e6)


def sequence(log: ir.Table, history_length: int = 10) -> list[dict[str, Any]]:
    return behavior_sequence(select_rows(log, START), log, history_length).to_pyarrow().to_pylist()


def test_a_row_holds_the_items_so_far_newest_first(logged: Callable[..., ir.Table]) -> None:
    first = [Event("a", 1, START + HOUR), Event("a", 2, START + HOUR, behavior="click")]
    last = [Event("a", 1, START + DAY, behavior="click"), Event("a", 3, START + DAY), Event("a", 3, START + DAY)]
    log = logged([*first, Event("a", 2, START + 2 * HOUR), *last])
    end, early, late = microseconds(START + DAY), microseconds(START + HOUR), microseconds(START + 2 * HOUR)
    assert behavior_sequence(select_rows(log, START), log, 10).to_pyarrow().to_pydict() == {
        "user_id": ["a", "a"],
        "known_at": [START + 2 * HOUR + MICROSECOND, START + DAY + MICROSECOND],
        "history_item_ids": [[2, 1], [1, 3, 2]],  # 1 and 3 have the same instant and count: by id
        "history_counts": [[2, 1], [2, 2, 2]],
        "history_last_us": [[late, early], [end, end, late]],
        "history_behaviors": [["purchase", "purchase"], ["click", "purchase", "purchase"]],
    }


def test_items_of_one_instant_stand_by_count(logged: Callable[..., ir.Table]) -> None:
    log = logged([Event("a", 1, START), Event("a", 2, START), Event("a", 2, START)])
    assert sequence(log)[0]["history_item_ids"] == [2, 1]


def test_long_histories_keep_the_newest_items(logged: Callable[..., ir.Table]) -> None:
    log = logged([Event("a", item, START + item * HOUR) for item in range(5)])
    assert sequence(log, history_length=2)[0]["history_item_ids"] == [4, 3]


def test_rows_replaced_before_the_first_cut_are_not_written(logged: Callable[..., ir.Table]) -> None:
    log = logged([Event("a", item, START + days * DAY) for item, days in ((1, -9), (2, -5), (3, 2))])
    rows = sequence(log)
    assert [row["known_at"] for row in rows] == [START - 5 * DAY + MICROSECOND, START + 2 * DAY + MICROSECOND]
    assert rows[0]["history_item_ids"] == [2, 1]


def test_statistics_count_the_whole_log_so_far(logged: Callable[..., ir.Table]) -> None:
    had = [Event("a", item, START + age) for item, age in ((1, -20 * DAY), (2, HOUR), (2, HOUR), (3, 3 * DAY))]
    log = logged([*had, Event("b", 1, START)])
    labels = {1: "bread", 2: "milk", 3: None}
    events = log.mutate(category=log.item_id.cases(*[(item, label) for item, label in labels.items() if label]))
    rows = user_statistics(select_rows(events, START), events).to_pyarrow().to_pylist()
    counts = [(row["user_id"], row["num_events"], row["num_items"], row["num_active_days"]) for row in rows]
    assert counts == [("a", 1, 1, 1), ("a", 3, 2, 2), ("a", 4, 3, 3), ("b", 1, 1, 1)]
    assert [row["top_categories"] for row in rows] == [["bread"], ["milk", "bread"], ["milk", "bread"], ["bread"]]
    assert rows[2]["last_us"] == microseconds(START + 3 * DAY)


def test_a_user_without_categories_has_an_empty_list(logged: Callable[..., ir.Table]) -> None:
    log = logged([Event("a", 1, START)])
    events = log.mutate(category=log.scenario.nullif("store"))
    rows = user_statistics(select_rows(events, START), events).to_pyarrow().to_pylist()
    assert rows[0]["top_categories"] == []
