"""The figure of the README, from the kept records."""

from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.records import Figure


def test_a_point_for_each_group_of_tasks_that_has_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "DATA_SETS", {"a": "A", "b": "B"})
    behaviour, search = figures.GROUPS
    lifts = {
        "a": {behaviour: Figure(0.1, 0.05, 0.2), search: Figure(0.05, -0.01, 0.1)},
        "b": {behaviour: Figure(-0.1, -0.2, 0.0)},
    }
    monkeypatch.setattr(figures, "find_lifts", lifts.__getitem__)
    axes = figures.draw_headline(tmp_path / "figure.png").axes[0]
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    points = {tuple(bars.lines[0].get_xydata()[0].round(6).tolist()) for bars in axes.containers}
    assert points == {(10.0, 1.14), (5.0, 0.86), (-10.0, 0.14)}
    assert [text.get_text() for text in axes.texts] == ["−10.0 %", "+10.0 %", "+5.0 %"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["B", "A"]
