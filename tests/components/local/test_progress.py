import io

import pytest
from rich.console import Console

from components.local.progress import _as_table, _numbers, _reason


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({}, ""),
        ({"loss": 1.23456, "step": 12000}, "loss 1.235  step 12,000"),
        ({"name": "text", "tasks": {"a": 1}, "rows": 3}, "rows 3"),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "a 1  b 2  c 3  d 4"),
    ],
)
def test_numbers_in_words(values, text):
    assert _numbers(values) == text


def test_reason_is_the_sentence_of_the_stage():
    lines = ["::group::Pre", "Running command", "error events: expected a file, got nothing; check.", "exit code 2"]
    assert _reason(lines) == ["error events: expected a file, got nothing; check."]


def test_reason_without_a_sentence_is_the_end_of_the_log():
    assert _reason(["::group::x", *map(str, range(20)), ""]) == [str(number) for number in range(8, 20)]


def test_table_shows_state_seconds_and_word():
    console = Console(file=io.StringIO(), width=100)
    console.print(_as_table([("sft", "running", 12.4, "training  loss 1.2"), ("gate", "waiting", None, "")]))
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert lines[1:] == [["sft", "running", "12", "training", "loss", "1.2"], ["gate", "waiting"]]
