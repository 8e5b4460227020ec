"""Kinds of items: one column per category and level, the upper levels and the largest categories first."""

import numpy as np
import pytest

from components.items import kinds
from components.items.codes import name_hashes
from components.items.kinds import kind_names, kind_vectors

PATHS = [["food", "ice"], ["food", "bread", "rolls"], ["food", "ice"], ["home", "ice"], ["home"], None, []]


def columns(vectors: np.ndarray) -> list[int]:
    """The column of each item; -1 without one."""
    assert set(vectors.sum(axis=1).tolist()) <= {0, 1}
    return np.where(vectors.any(axis=1), vectors.argmax(axis=1), -1).tolist()


def test_each_level_has_a_column_per_category_the_largest_first() -> None:
    found = kind_vectors(PATHS)
    assert list(found) == ["category_0", "category_1"]  # at the third level there is but one
    top, present = found["category_0"]
    assert columns(top) == [0, 0, 0, 1, 1, -1, -1]
    np.testing.assert_array_equal(present, top.any(axis=1))
    # "ice" of food and of home are two categories; those with one item each come by name.
    assert columns(found["category_1"][0]) == [0, 1, 0, 2, -1, -1, -1]


def test_columns_are_given_from_the_top_until_there_are_none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "MAX_KINDS", 4)
    found = kind_vectors(PATHS)
    assert columns(found["category_1"][0]) == [0, 1, 0, -1, -1, -1, -1]
    assert found["category_1"][1].tolist() == [True, True, True, False, False, False, False]
    monkeypatch.setattr(kinds, "MAX_KINDS", 3)  # one column tells nothing
    assert list(kind_vectors(PATHS)) == ["category_0"]


def test_columns_have_the_names_of_their_categories() -> None:
    names = kind_names(PATHS)
    assert list(names) == list(kind_vectors(PATHS))
    np.testing.assert_array_equal(names["category_0"], name_hashes(["food", "home"]))
    np.testing.assert_array_equal(names["category_1"], name_hashes(["ice", "bread", "ice"]))


def test_a_catalogue_without_categories_has_no_kinds() -> None:
    assert kind_vectors([None, [], None]) == kind_names([None, [], None]) == {}
    assert kind_vectors([["all"], ["all"]]) == kind_names([["all"], ["all"]]) == {}
