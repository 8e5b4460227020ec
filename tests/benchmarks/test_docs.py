"""The command that writes the tables of the documentation; `make lint` runs its check on the committed pages."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.docs import REPOSITORY, main
from benchmarks.records import SEEDS, Table, find_behaviour_tasks, find_mean_lift, pool_seeds

TABLES: dict[str, Table] = {"two": lambda: "| a |\n| --- |\n| 2 |", "three": lambda: "| a |\n| --- |\n| 3 |"}
BLOCKS = "# Title\n\n<!-- table: two -->\nold\n<!-- /table -->\n\nText.\n\n<!-- table: three -->\n<!-- /table -->\n"
FILLED = BLOCKS.replace("old", TABLES["two"]()).replace("three -->\n", f"three -->\n{TABLES['three']()}\n")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "docs" / "deep" / "page.md"
    path.parent.mkdir(parents=True)
    path.write_text(BLOCKS)
    return path


def test_the_command_fills_every_block_and_leaves_the_rest(page: Path, tmp_path: Path) -> None:
    assert main([], tmp_path, TABLES) == 0
    assert page.read_text() == FILLED
    assert main(["--check"], tmp_path, TABLES) == 0


def test_a_check_names_file_and_block_and_writes_nothing(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page.write_text(changed := FILLED.replace("| 3 |", "| 4 |"))
    assert main(["--check"], tmp_path, TABLES) == 1
    assert capsys.readouterr().out == (
        "docs/deep/page.md: table 'three' is not what `python -m benchmarks.docs` writes; run it.\n"
    )
    assert page.read_text() == changed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("<!-- table: four -->\n<!-- /table -->\n", "docs/deep/page.md, table 'four': expected one of three, two, got"),
        ("\n<!-- table: two -->\n", "line 2, marker `<!-- table: two -->`: expected `<!-- /table -->` after it"),
        ("<!-- table: two -->\n<!-- table: three -->\n<!-- /table -->\n", "line 1, marker `<!-- table: two -->`"),
        ("<!-- /table -->\n", "line 1, marker `<!-- /table -->`: expected a start marker before it"),
    ],
)
def test_a_faulty_marker_is_one_sentence(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, sentence: str
) -> None:
    page.write_text(text)
    assert main([], tmp_path, TABLES) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert page.read_text() == text


def test_behaviour_tasks_are_those_without_a_query() -> None:
    assert find_behaviour_tasks("amazon_toys") == ("next_item", "tail_item", "cold_item", "long_history")
    assert "text_query" not in find_behaviour_tasks("complete_journey")


def test_the_mean_lift_of_some_tasks_is_the_mean_over_the_same_draws() -> None:
    whole = pool_seeds("complete_journey", SEEDS).baseline
    some = whole.restrict(find_behaviour_tasks("complete_journey"))
    places = [whole.tasks.index(task) for task in some.tasks]
    draws = (whole.model_draws / whole.baseline_draws - 1)[:, places].mean(axis=1)
    lift = find_mean_lift(some)
    assert len(places) == 8
    assert lift.value == pytest.approx(whole.lift[places].mean())
    assert (lift.low, lift.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))


def test_every_result_page_is_linked_from_the_index() -> None:
    folder = REPOSITORY / "docs" / "results"
    index = (folder / "README.md").read_text()
    pages = {str(path.relative_to(folder)) for path in folder.rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()
