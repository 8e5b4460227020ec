"""Tables of ablations: the slope against the number of user vectors, from recalls that were made up."""

import pandas as pd
import pytest

from benchmarks import ablation_tables
from benchmarks.ablation_tables import NARROW, Study, render_slopes
from benchmarks.records import order_tasks

TASKS = order_tasks(NARROW.config)


def test_the_slope_of_a_task_is_what_a_doubling_of_the_user_vectors_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One task gains .02 with each doubling, the others nothing; groups with a single number, or none, have no row."""
    kept = ["d_64_h_1", "d_64_h_4", "d_64_h_16", "d_128_h_1", "d_128_h_4", "d_256_h_1", "none"]

    def read(study: Study, variant: str) -> pd.DataFrame:
        doublings = {"1": 0, "4": 2, "16": 4}[variant.rsplit("_", 1)[1]]
        rows = [
            (0, f"{task} {user}", user, task, 0.1 + 0.02 * doublings * (task == TASKS[0]))
            for task in TASKS
            for user in "abc"
        ]
        return pd.DataFrame(rows, columns=["seed", "example_id", "user_id", "task", "recall"])

    monkeypatch.setattr(Study, "kept", lambda study: kept)
    monkeypatch.setattr(ablation_tables, "read_variant", read)
    head, _, *rows = [line.strip("| ").split(" | ") for line in render_slopes(NARROW).splitlines()]
    assert head == ["group", "mean", *TASKS]
    assert [row[0] for row in rows] == ["`d_64`", "`d_128`"]
    for row in rows:
        assert row[2] == "+.0200 (+.0200 … +.0200)"
        assert set(row[3:]) == {"+.0000 (+.0000 … +.0000)"}
        assert row[1].startswith("+.0022 ")
