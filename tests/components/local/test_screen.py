import io
import json

import pytest
from rich.console import Console

from components.exceptions import MissingInputError
from components.local.screen import comparison_table, print_release, print_verdict
from tests.worlds.tables import put

RECALLS = {"popularity": 0.05, "own_history": 0.2, "target_attention": 0.25, "urm": 0.26}
TASK = {"baseline": 0.25, "urm": 0.26, "lift": 0.04, "low": -0.01, "high": 0.093, "examples": 1234, "recall": RECALLS}
TASK["search"] = False
MEAN = {"mean_recall": RECALLS | {"item_knn": 0.1}, "lift": 0.04, "lift_low": 0.01, "lift_high": 0.07}
SEARCH = MEAN | {"lift": None, "lift_low": None, "lift_high": None}
METRICS = MEAN | {"search": SEARCH, "tasks": {"text_query": TASK | {"search": True}, "next_purchase": TASK}}


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=160)


@pytest.fixture
def leave(tmp_path):
    """Writes a stage's JSON output and its result."""

    def write(stage, name, content):
        folder = tmp_path / stage
        folder.mkdir()
        (folder / f"{name}.json").write_text(json.dumps(content))
        put(tmp_path, stage, {name: folder / f"{name}.json"})
        return str(tmp_path)

    return write


def _text(console):
    return console.file.getvalue()


def test_table_has_every_model_lift_and_interval(console):
    console.print(comparison_table(METRICS, 100))
    text = _text(console)
    row = next(line for line in text.splitlines() if "next_purchase" in line)
    assert row.split() == [
        "next_purchase", "1234", "0.050", "0.200", "–", "–", "0.250", "0.260", "+4.0%", "-1.0…+9.3%",
    ]  # fmt: skip
    assert "Recall@100" in text
    lines = [line.split() for line in text.splitlines()]
    first = [line[0] for line in lines if line and line[0] in ("next_purchase", "text_query", "mean")]
    assert first == ["next_purchase", "mean", "text_query", "mean"]
    means = [line[-2:] for line in lines if line and line[0] == "mean"]
    assert means == [["+4.0%", "+1.0…+7.0%"], ["–", "–"]]


def test_table_fits_a_narrow_terminal():
    narrow = Console(file=io.StringIO(), width=80)
    narrow.print(comparison_table(METRICS, 100))
    text = _text(narrow)
    assert "-1.0…+9.3%" in text
    assert all(len(line) <= 80 for line in text.splitlines())


@pytest.mark.parametrize(
    ("passed", "anyway", "said", "unsaid"),
    [
        (True, False, "Gate: passed", "NOT PASS"),
        (False, False, "Nothing was released", "DID NOT PASS"),
        (False, True, "THE MODEL DID NOT PASS", "Nothing was released"),
        (True, True, "Gate: passed", "DID NOT PASS"),
    ],
)
def test_verdict_is_plain(console, leave, passed, anyway, said, unsaid):
    run_dir = leave("gate", "verdict", {"passed": passed, "verdict": "In words.", "reasons": ["won 3 of 9"]})
    assert print_verdict(console, run_dir, promoted_anyway=anyway) is passed
    text = _text(console)
    assert said in text
    assert unsaid not in text
    assert "In words." in text
    assert "• won 3 of 9" in text


def test_release(console, leave):
    deployment = {"release": "urm-2", "version": "4", "previous": "3", "outcome": "serving", "seconds": 2.25}
    print_release(console, leave("promote", "deployment", deployment))
    assert "Release urm-2  alias champion of version 4, before it version 3; serving after 2.2 s" in _text(console)


def test_a_run_without_a_gate_is_one_sentence(console, tmp_path):
    with pytest.raises(MissingInputError, match=r"run .*: expected the result of stage 'gate', got none"):
        print_verdict(console, str(tmp_path), promoted_anyway=False)
