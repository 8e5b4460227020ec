import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from components.exceptions import DataError, MissingInputError
from components.items import table as table_module
from components.items.codes import list_words, name_hashes
from components.items.table import ItemTable, link_table, write_item_table

INT64 = np.iinfo(np.int64)
any_id = st.one_of(
    st.integers(-50, 50),
    st.integers(int(INT64.min), int(INT64.max)),
    st.sampled_from([int(INT64.min), int(INT64.max), -1, 0]),
    st.integers(0, 40).map(lambda power: 1 << power),  # equal low bits: what a hash must spread
)


def write(folder: Path, keys: list[int], **modalities: tuple[np.ndarray, np.ndarray]) -> ItemTable:
    write_item_table(folder, np.array(keys, dtype=np.int64), modalities)
    return ItemTable.open(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.lists(any_id, unique=True, max_size=200), absent=st.lists(any_id, max_size=50), data=st.data())
def test_lookups_equal_a_dict(tmp_path_factory, keys: list[int], absent: list[int], data: st.DataObject) -> None:
    vectors = data.draw(hnp.arrays(np.float16, (len(keys), 3), elements=st.floats(-100, 100, width=16)))
    present = data.draw(hnp.arrays(np.bool_, len(keys)))
    table = write(tmp_path_factory.mktemp("table"), keys, text=(vectors, present))
    oracle = {key: row for row, key in enumerate(keys)}

    asked = data.draw(st.permutations(keys + absent + absent))
    assert table.rows(np.array(asked, dtype=np.int64)).tolist() == [oracle.get(key, -1) for key in asked]

    gathered, found = table.gather("text", np.array(asked, dtype=np.int64))
    assert gathered.dtype == np.float32
    for key, vector, has in zip(asked, gathered, found, strict=True):
        expected = key in oracle and present[oracle[key]]
        assert has == expected
        np.testing.assert_array_equal(vector, vectors[oracle[key]] if expected else np.zeros(3))


@settings(max_examples=100, deadline=None)
@given(keys=st.lists(any_id, unique=True, max_size=300))
def test_slots_hold_every_row_once_at_half_load_or_less(keys: list[int]) -> None:
    slots = table_module._build_slots(np.array(keys, dtype=np.int64))
    assert sorted(slots[slots >= 0]) == list(range(len(keys)))
    assert len(keys) <= len(slots) / 2


def test_probes_stay_short_for_consecutive_and_strided_ids() -> None:
    for keys in (np.arange(100_000), np.arange(100_000) << 20, -np.arange(100_000)):
        slots = table_module._build_slots(keys)
        home = table_module._home_slots(keys, len(slots) - 1)
        placed = np.empty(len(keys), dtype=np.int64)
        placed[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
        # Linear probing at load a needs (1 + 1/(1-a))/2 probes on average (Knuth 6.4); load is 100,000 / 262,144.
        load = len(keys) / len(slots)
        probes = ((placed - home) & (len(slots) - 1)) + 1
        assert probes.mean() == pytest.approx((1 + 1 / (1 - load)) / 2, rel=0.05)


def test_duplicate_ids_are_refused_and_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"item ids: expected each once, got -7 twice or more \(2 repeats in all\)"):
        write(tmp_path, [3, -7, 5, -7, -7])
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_of_a_table_with_one_bad_modality(tmp_path: Path) -> None:
    good, bad = (np.ones((2, 2)), np.ones(2, dtype=bool)), (np.full((2, 2), np.inf), np.ones(2, dtype=bool))
    with pytest.raises(DataError, match="modality 'worse': expected values finite"):
        write(tmp_path, [1, 2], text=good, worse=bad)
    assert list(tmp_path.iterdir()) == []


def test_empty_table_answers(tmp_path: Path) -> None:
    table = write(tmp_path, [], text=(np.zeros((0, 4)), np.zeros(0, dtype=bool)))
    assert len(table) == 0
    assert table.rows([0, -1, int(INT64.max)]).tolist() == [-1, -1, -1]
    vectors, present = table.gather("text", [1, 2])
    assert vectors.shape == (2, 4)
    assert not present.any()
    assert table.rows(np.array([], dtype=np.int64)).shape == (0,)


def test_arrays_are_read_only_maps_of_the_files(tmp_path: Path) -> None:
    table = write(tmp_path, [1, 2], text=(np.ones((2, 2)), np.array([True, False])))
    assert isinstance(table.modalities["text"].vectors, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        table.modalities["text"].vectors[0, 0] = 5
    with pytest.raises(TypeError, match="item assignment"):
        table.modalities["text"] = None  # type: ignore[index]


def test_a_second_folder_shares_the_files(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    write(source, [10, 20, 30], text=(np.ones((3, 2)), np.ones(3, dtype=bool)))
    table = link_table(source, target)
    assert (set(table.modalities), table.rows([30]).tolist()) == ({"text"}, [2])
    names = {path.name for path in source.iterdir()}
    assert {path.name for path in target.iterdir()} == names
    assert all(os.path.samefile(source / name, target / name) for name in names)


def test_words_of_a_modality_stay_with_the_table(tmp_path: Path) -> None:
    words = list_words(["lip balm", "lip gloss"])
    arrays = (np.ones((1, 2)), np.ones(1, dtype=bool))
    write_item_table(tmp_path / "source", np.array([1]), {"lexical": arrays}, {"lexical": words})
    table = link_table(tmp_path / "source", tmp_path / "target")
    assert set(table.modalities) == {"lexical"}
    np.testing.assert_array_equal(table.words["lexical"], words)
    assert not write(tmp_path / "older", [1], lexical=arrays).words
    np.save(tmp_path / "target" / "lexical.words.npy", np.ones(3))
    with pytest.raises(DataError, match=r"lexical\.words\.npy: expected .*, got float64 of 1"):
        ItemTable.open(tmp_path / "target")


def test_names_of_columns_stay_with_the_table(tmp_path: Path) -> None:
    names = name_hashes(["lips", "hands"])
    arrays = (np.eye(2), np.ones(2, dtype=bool))
    write_item_table(tmp_path / "source", [1, 2], {"category_0": arrays}, names={"category_0": names})
    table = link_table(tmp_path / "source", tmp_path / "target")
    np.testing.assert_array_equal(table.names["category_0"], names)
    assert not table.words and not write(tmp_path / "older", [1, 2], category_0=arrays).names
    np.save(tmp_path / "source" / "category_0.names.npy", names[:1])
    with pytest.raises(DataError, match=r"category_0\.names\.npy: expected 2 names as in category_0\.npy, got 1"):
        ItemTable.open(tmp_path / "source")


def test_a_second_folder_has_copies_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    write(tmp_path / "source", [1], text=(np.ones((1, 2)), np.ones(1, dtype=bool)))
    table = link_table(tmp_path / "source", tmp_path / "target")
    assert table.rows([1]).tolist() == [0]
    assert not os.path.samefile(tmp_path / "source" / "keys.npy", tmp_path / "target" / "keys.npy")


def test_a_second_folder_holds_no_table_yet_and_the_first_one_does(tmp_path: Path) -> None:
    write(tmp_path / "source", [1])
    write(tmp_path / "target", [2])
    with pytest.raises(DataError, match=r"target: expected no item table yet, got one"):
        link_table(tmp_path / "source", tmp_path / "target")
    with pytest.raises(MissingInputError, match=r"item table .*none: expected file keys\.npy"):
        link_table(tmp_path / "none", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("Keys", "expected a name of lower-case letters"), ("slots", "other than keys and slots")],
)
def test_names_that_are_no_file_of_a_modality_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        write(tmp_path, [1], **{name: (np.ones((1, 2)), np.ones(1, dtype=bool))})


def test_vectors_that_overflow_float16_are_refused(tmp_path: Path) -> None:
    vectors = np.array([[1.0], [70_000.0], [np.nan]])
    with pytest.raises(DataError, match="expected values finite in float16, got 2 rows that are not"):
        write(tmp_path, [1, 2, 3], text=(vectors, np.ones(3, dtype=bool)))
    table = write(tmp_path, [1, 2, 3], text=(vectors, np.array([True, False, False])))  # absent rows do not count
    assert table.modalities["text"].vectors.ravel().tolist() == [1, 0, 0]


def test_shapes_that_disagree_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected vectors \[2, d\] and present \[2\], got \[3, 4\] and \[2\]"):
        write(tmp_path, [1, 2], text=(np.ones((3, 4)), np.ones(2, dtype=bool)))


def test_a_table_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path, [1])
    with pytest.raises(DataError, match="expected no item table yet, got one"):
        write(tmp_path, [2])


def test_opening_what_is_no_table(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"expected file keys\.npy, got none; run `urm encode` again"):
        ItemTable.open(tmp_path)


@pytest.mark.parametrize("name", ["keys", "slots", "text", "text.present"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    write(tmp_path, list(range(100)), text=(np.ones((100, 2)), np.ones(100, dtype=bool)))
    path = tmp_path / f"{name}.npy"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match=rf"item table file .*{name}\.npy"):
        ItemTable.open(tmp_path)


def test_files_of_two_tables_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path / "a", [1, 2], text=(np.ones((2, 2)), np.ones(2, dtype=bool)))
    write(tmp_path / "b", [1, 2, 3], text=(np.ones((3, 2)), np.ones(3, dtype=bool)))
    os.replace(tmp_path / "b" / "text.npy", tmp_path / "a" / "text.npy")
    with pytest.raises(DataError, match=r"text\.npy: expected 2 rows as in keys\.npy, got 3"):
        ItemTable.open(tmp_path / "a")


def test_unknown_modality_names_the_known(tmp_path: Path) -> None:
    table = write(tmp_path, [1], text=(np.ones((1, 2)), np.ones(1, dtype=bool)))
    with pytest.raises(DataError, match=r"expected modality 'image', got text; set urm\.modalities"):
        table.gather("image", [1])
