from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.large_logs import BEHAVIORS, DAYS, START, LargeLog

EVENTS = 40_000


def test_a_log_has_the_events_asked_for_on_every_day_of_the_year(tmp_path):
    LargeLog(EVENTS).write(tmp_path)
    events = pq.read_table(tmp_path / "events")
    assert events.num_rows == EVENTS
    days = pc.unique(pc.floor_temporal(events["ts"], unit="day")).to_pylist()
    assert days == [START + timedelta(days=day) for day in range(DAYS)]
    assert set(pc.unique(events["behavior"]).to_pylist()) == set(BEHAVIORS)
    items = pq.read_table(tmp_path / "items.parquet")["item_id"].to_pylist()
    assert items == list(range(EVENTS // 100))
    assert set(events["item_id"].to_pylist()) <= set(items)


def test_a_few_users_and_items_have_much_of_the_log_and_histories_repeat():
    log = pa.concat_tables([LargeLog(EVENTS).day(day, EVENTS // DAYS) for day in range(DAYS)])
    for column, number, least in (("user_id", EVENTS // 20, 0.2), ("item_id", EVENTS // 100, 0.3)):
        counts = np.sort(pc.value_counts(log[column]).field("counts").to_numpy())[::-1]
        assert counts[: number // 10].sum() > least * log.num_rows  # of a tenth of them
    distinct = log.group_by(["user_id", "item_id"]).aggregate([]).num_rows
    assert distinct < 0.9 * log.num_rows


def test_the_seed_decides():
    assert LargeLog(EVENTS, 1).day(7, 500).equals(LargeLog(EVENTS, 1).day(7, 500))
    assert not LargeLog(EVENTS, 1).day(7, 500).equals(LargeLog(EVENTS, 2).day(7, 500))


def test_seasons_move_the_items():
    large = LargeLog(10_000_000)
    summer, next_day, winter = (set(large.day(day, 20_000)["item_id"].to_pylist()) for day in (181, 182, 355))
    assert len(summer & next_day) > 1.05 * len(summer & winter)
