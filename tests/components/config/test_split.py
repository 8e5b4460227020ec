from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from components.config import SEQUENCE_LAST_DAY, SplitConfig


@given(length=st.integers(1, 80), max_train_cuts=st.integers(1, 60))
def test_leave_one_out_leaves_out_the_last_two_of_a_sequence(length: int, max_train_cuts: int) -> None:
    split = SplitConfig.model_validate({"kind": "leave_one_out", "max_train_cuts": max_train_cuts})
    days = [SEQUENCE_LAST_DAY - timedelta(days=length - 1 - place) for place in range(length)]
    cuts = split.cuts()
    found = {place: name for place, day in enumerate(days) for cut, name in cuts if cut <= day < cut + split.window}
    expected = {length - 1: "test", length - 2: "validation"}
    expected |= {place: "train" for place in range(max(0, length - 2 - max_train_cuts), length - 2)}
    assert found == {place: name for place, name in expected.items() if place >= 0}


days = st.integers(0, 60)


@settings(max_examples=200, deadline=None)
@given(start=days, lengths=st.tuples(*[st.integers(7, 60)] * 3), window=st.integers(1, 7))
def test_windows_never_cross_a_split(start: int, lengths: tuple[int, int, int], window: int) -> None:
    first = datetime(2017, 1, 1, tzinfo=UTC) + timedelta(days=start)
    bounds = [first]
    for length in lengths:
        bounds.append(bounds[-1] + timedelta(days=length))
    names = ("train_start", "validation_start", "test_start", "end")
    split = SplitConfig(**dict(zip(names, bounds, strict=True)), window_days=window)
    cuts = split.cuts()
    limits = dict(zip(("train", "validation", "test"), pairwise(bounds), strict=True))
    for cut, name in cuts:
        assert limits[name][0] <= cut
        assert cut + timedelta(days=window) <= limits[name][1]
    instants = [cut for cut, _ in cuts]
    assert instants == sorted(set(instants))
    expected = {name: (after - before) // timedelta(days=window) for name, (before, after) in limits.items()}
    assert {name: sum(split == name for _, split in cuts) for name in limits} == expected
    for recent in (1, 3, 100):  # whether or not training is a multiple of the window
        newest = split.model_copy(update={"recent_cuts": recent}).recent_start
        found = [cut for cut, name in cuts if name == "train" and cut >= newest]
        assert len(found) == min(recent, expected["train"])
        assert found[0] == newest


def test_bounds_on_both_sides_of_summer_time_are_refused() -> None:
    """An hour is missing to the last week of training, whose cut would be left out."""
    bounds: dict[str, Any] = {
        "train_start": "2026-02-02T00:00+01:00",
        "validation_start": "2026-04-06T00:00+02:00",
        "test_start": "2026-04-13T00:00+02:00",
        "end": "2026-04-20T00:00+02:00",
    }
    with pytest.raises(ValidationError, match=r"whole windows between 2026-02-02.*one offset"):
        SplitConfig.model_validate(bounds)
    cuts = SplitConfig.model_validate({**bounds, "train_start": "2026-02-02T00:00+02:00"}).cuts()
    assert [split for _, split in cuts].count("train") == 9
