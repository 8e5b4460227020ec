from datetime import UTC, date, datetime

import numpy as np
import pandas as pd
import pytest

from components.config import load_document
from components.exceptions import ConfigError
from components.schemas.events import EVENTS, ITEMS
from components.studies.abilities.calendar import Calendar, Occasion, count_events, measure_lifts
from tests.worlds import CONFIGS
from tests.worlds.tables import event_row, item_row, write

CALENDAR = Calendar(
    zone="America/New_York",
    level=2,
    window_days=2,
    ordinary="an ordinary day",
    occasions=(Occasion(name="A", day=date(2017, 3, 5)), Occasion(name="B", day=date(2017, 6, 5))),
    templates=("For {occasion}, people buy {category}",),
)
PATHS = [("shop", "milk"), ("shop", "ham")]


def counts(rows):
    return pd.DataFrame.from_dict(rows, orient="index").set_axis(pd.Index(PATHS, tupleize_cols=False), axis=1)


def test_lifts_by_hand():
    log = counts(
        {
            date(2017, 3, 1): [60, 40],  # ordinary
            date(2017, 3, 4): [10, 40],  # the window of A
            date(2017, 3, 5): [20, 30],
            date(2017, 6, 1): [90, 10],  # ordinary, in another season
            date(2017, 6, 5): [0, 100],  # the window of B
            date(2017, 12, 1): [0, 999],  # too late to be ordinary
        }
    )
    until = date(2017, 12, 1)
    np.testing.assert_allclose(
        measure_lifts(log, CALENDAR, until),
        [[40 / 85, 80 / 35], [10 / 85, 110 / 35]],  # 150 of 200 ordinary are milk
    )
    np.testing.assert_allclose(
        measure_lifts(log, CALENDAR, until, nearby=True), [[40 / 70, 80 / 50], [10 / 100, 110 / 20]]
    )


def test_the_day_of_a_split_is_that_of_the_shop():
    assert CALENDAR.local_day(datetime(2017, 10, 1, tzinfo=UTC)) == date(2017, 9, 30)
    assert CALENDAR.local_day(datetime(2017, 10, 1, 5, tzinfo=UTC)) == date(2017, 10, 1)


def test_days_are_those_of_the_shop_and_paths_are_cut(tmp_path):
    items = [
        item_row(1, category=["shop", "milk", "2 %"]),
        item_row(2, category=["shop", "ham"]),
        item_row(3, category=["shop"]),
    ]
    times = {1: datetime(2017, 3, 5, 4, 59, tzinfo=UTC), 2: datetime(2017, 3, 5, 5, 1, tzinfo=UTC)}
    events = [event_row(item, item, ts) for item, ts in (times | {3: times[1]}).items()]
    found = count_events(
        write(tmp_path / "events.parquet", EVENTS, events),
        write(tmp_path / "items.parquet", ITEMS, items),
        CALENDAR,
    )
    assert found.to_dict() == {
        ("shop", "milk"): {date(2017, 3, 4): 1, date(2017, 3, 5): 0},
        ("shop", "ham"): {date(2017, 3, 4): 0, date(2017, 3, 5): 1},
    }


@pytest.mark.parametrize(
    ("name", "category", "shared"),
    [
        ("Valentine's Day", "valentines candy", True),
        ("Mother's Day", "day old bread", False),
        ("the Super Bowl", "fruit bowls", True),
        ("Thanksgiving", "turkey", False),
    ],
)
def test_a_shared_word(name, category, shared):
    assert Occasion(name=name, day=date(2017, 1, 1)).shares_word(("shop", category)) is shared


def test_another_name_is_a_name():
    fourth = Occasion(name="the Fourth of July", day=date(2017, 7, 4), other_names=("Independence Day",))
    assert fourth.shares_word(("independence decor",))


def test_occasions_of_the_test_split_serve_no_choice():
    calendar = load_document(CONFIGS / "occasions" / "complete_journey.yaml", Calendar)
    choice, report = calendar.halves(date(2017, 12, 18))
    names = [occasion.name for occasion in choice]
    assert names == ["the Super Bowl", "St. Patrick's Day", "Mother's Day", "the Fourth of July", "Halloween"]
    assert {occasion.name for occasion in report} == {occasion.name for occasion in calendar.occasions} - set(names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"templates": ["For {occasion}"]}, r"expected \{category\} and \{occasion\}"),
        ({"templates": ["{category} for {occasion} now"]}, "one of them the last word"),
        (
            {"occasions": CALENDAR.model_dump(mode="json")["occasions"][::-1]},
            "expected occasions by date, but 'A' follows",
        ),
    ],
)
def test_a_calendar_that_cannot_be_used(tmp_path, change, message):
    path = tmp_path / "calendar.yaml"
    path.write_text(pd.Series(CALENDAR.model_dump(mode="json") | change).to_json())
    with pytest.raises(ConfigError, match=message):
        load_document(path, Calendar)
