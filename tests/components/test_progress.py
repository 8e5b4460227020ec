import pytest

from components import progress
from components.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_rate_share_and_rest_are_said_every_ten_seconds(clock: list[float]) -> None:
    said: list[str] = []
    done = Progress(said.append, "writing events", "rows", 40_000)
    for seconds in (4, 9, 10, 19, 20):
        clock[0] = 100 + seconds
        done.add(2_000)
    assert said == [
        "writing events: 6,000 rows, 600 per second, 15%, 57 s to go",
        "writing events: 10,000 rows, 500 per second, 25%, 60 s to go",
    ]


def test_without_a_total_there_is_no_share(clock: list[float]) -> None:
    said: list[str] = []
    done = Progress(said.append, "writing events", "rows")
    clock[0] += 20
    done.add(1_000)
    assert said == ["writing events: 1,000 rows, 50 per second"]
