import ibis
import pytest

from components.features.categories import LEAF, in_words, level_of, word_label


@pytest.mark.parametrize(
    ("path", "label"),
    [
        (["GROCERY", "SOFT DRINKS", "COLA"], "soft drinks"),
        (["GROCERY", "BREAD:ITALIAN/FRENCH"], "bread italian french"),
        (["PASTRY"], "pastry"),
        (["DRUG GM", "-"], None),
        ([], None),
    ],
)
def test_label_is_the_second_level_in_words(engine: ibis.BaseBackend, path: list[str], label: str | None) -> None:
    table = ibis.memtable({"path": [path]}, schema={"path": "array<string>"})
    assert table.select(label=word_label(table.path)).to_pyarrow()["label"].to_pylist() == [label]


def test_a_level_below_the_leaf_is_null(engine: ibis.BaseBackend) -> None:
    table = ibis.memtable({"path": [["A", "B"]]}, schema={"path": "array<string>"})
    levels = table.select(**{f"level_{level}": level_of(table.path, level) for level in range(3)}).to_pyarrow()
    assert levels.to_pylist() == [{"level_0": "A", "level_1": "B", "level_2": None}]
    assert table.select(leaf=level_of(table.path, LEAF)).to_pyarrow()["leaf"].to_pylist() == ["B"]
    assert table.select(words=in_words(level_of(table.path, 2))).to_pyarrow()["words"].to_pylist() == [None]


def test_no_path_has_no_leaf(engine: ibis.BaseBackend) -> None:
    table = ibis.memtable({"path": [[]]}, schema={"path": "array<string>"})
    assert table.select(leaf=level_of(table.path, LEAF)).to_pyarrow()["leaf"].to_pylist() == [None]
