"""Index space, ragged gathering, buckets, and refused inputs."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from components.baseline.data import Dataset, bucket, find, gather
from components.exceptions import DataError
from components.items.words import split_words
from tests.worlds.baseline import history_of, targets_of


def test_gather_by_hand() -> None:
    values, offsets = np.array([10, 11, 20, 40, 41, 42]), np.array([0, 2, 3, 3, 6])
    found, owner = gather(values, offsets, np.array([3, 2, 0]))
    assert found.tolist() == [40, 41, 42, 10, 11]
    assert owner.tolist() == [0, 0, 0, 2, 2]


def test_find_marks_what_is_absent() -> None:
    assert find(np.array([2, 5, 9]), np.array([9, 3, 2, 10])).tolist() == [2, -1, 0, -1]


def test_buckets_are_quantiles_and_zero_is_unknown() -> None:
    assert bucket(np.array([1.0, 2.0, 3.0, 4.0, np.nan]), num_buckets=2).tolist() == [1, 1, 2, 2, 0]
    assert bucket(np.array([np.nan, np.nan])).tolist() == [0, 0]


def test_words_are_lower_case() -> None:
    assert split_words("Fluid MILK-products") == ["fluid", "milk", "products"]


def test_histories_and_targets_are_those_of_the_tables(world, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.baseline.data.BATCH_ROWS", 7)  # many batches, and one that is not full
    data = world.load()
    contexts = pq.read_table(world.folder / "contexts.parquet").to_pylist()
    examples = pq.read_table(world.folder / "examples.parquet").to_pylist()
    trained = [name for context in contexts if context["split"] == "train" for name in context["history_behaviors"]]
    known = sorted(set(trained))
    columns = {"counts": data.contexts.counts, "days_since": data.contexts.days, "behaviors": data.contexts.behaviors}
    assert len(data.contexts.offsets) == len(contexts) + 1
    for row, example in enumerate(examples):
        assert data.examples.ids[row] == example["example_id"]
        assert data.examples.splits[row] == example["split"]
        assert data.tasks[data.examples.tasks[row]].name == example["task"]
        assert data.items.ids[targets_of(data, row)].tolist() == example["target_item_ids"]
        context, history = contexts[data.examples.contexts[row]], history_of(data, row)
        assert context["context_id"] == example["context_id"]
        places = [place for place, item in enumerate(context["history_item_ids"]) if item in set(data.items.ids)]
        assert data.items.ids[data.contexts.items[history]].tolist() == [
            context["history_item_ids"][place] for place in places
        ]
        for name, column in columns.items():
            expected = [context[f"history_{name}"][place] for place in places]
            codes = (
                [known.index(one) + 1 if one in known else 0 for one in expected] if name == "behaviors" else expected
            )
            assert column[history].tolist() == codes


def test_items_have_what_the_item_table_counts_beside_baskets(data: Dataset) -> None:
    """The fixture's second count is an eighth of the first."""
    of_count = data.items.features[:, data.items.names.index("popularity_1")]
    expected = [1 + int(math.log2(1 + events // 8)) for events in data.items.train_events.tolist()]
    assert of_count.tolist() == expected
    assert {1, 2, 3} <= set(expected)  # 0 baskets, 1 to 2, 3 to 6: three stands exactly at a power of two


@pytest.mark.parametrize(
    ("table", "edit", "message"),
    [
        ("items", lambda table: table.slice(0, 50), "catalogue: expected items of the items table only"),
        ("examples", lambda table: table.filter(pc.field("split") != "validation"), "got none of validation"),
        (
            "examples",
            lambda table: table.set_column(3, table.schema.field("task"), pa.array(["other"] * table.num_rows)),
            "known contexts, and tasks of this run",
        ),
    ],
    ids=["a catalogue item without a row", "a missing split", "an unknown task"],
)
def test_tables_that_do_not_fit_are_refused(with_table: Callable, table: str, edit: Callable, message: str) -> None:
    with pytest.raises(DataError, match=message):
        with_table(table, edit).load()


def test_tasks_asked_in_the_same_words_share_a_prompt(data: Dataset) -> None:
    first, second, third = data.tasks
    same = third.model_copy(update={"prompt": first.prompt, "exclude_bought": True})
    shared = dataclasses.replace(data, tasks=(first, second, same))
    assert data.prompts.tolist() == [0, 1, 2]
    assert shared.prompts.tolist() == [0, 1, 0]
    assert shared.exclude_bought.tolist() == [False, True, True]


def test_queries_are_kept_with_their_examples(data: Dataset) -> None:
    asked = data.examples.query >= 0
    assert np.array_equal(asked, data.examples.tasks == 2)
    for row in np.flatnonzero(asked)[:20]:
        start, end = data.examples.word_offsets[row : row + 2]
        known = [data.examples.vocabulary[code] for code in data.examples.words[start:end]]
        words = split_words(data.examples.queries[data.examples.query[row]])
        assert known == [word for word in words if word in data.examples.vocabulary]
