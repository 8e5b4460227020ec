"""Logs of several shops as one."""

import gzip
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.join_logs import ITEMS, SEQUENCES, join
from components.exceptions import ConfigError, DataError


def write_shop(folder: Path, lines: str, phrases: list[str]) -> Path:
    folder.mkdir(parents=True)
    (folder / SEQUENCES).write_bytes(gzip.compress(lines.encode()))
    numbers = range(1, len(phrases) + 1)
    items = {"item_id": numbers, "asin": [f"B{number}" for number in numbers], "phrase": phrases, "attribute_ids": 1}
    pd.DataFrame(items).to_parquet(folder / ITEMS)
    return folder


def test_users_and_items_stay_apart(tmp_path: Path) -> None:
    first = write_shop(tmp_path / "tea", "1 2 1\n3 2\n\n", ["pot", "cup"])
    second = write_shop(tmp_path / "toys", "2 1 3\n1 2 2", ["ball", "kite", "doll"])
    third = write_shop(tmp_path / "rope", "1 1", ["rope"])
    join([first, second, third], tmp_path / "out" / "joined")
    text = gzip.decompress((tmp_path / "out" / "joined" / SEQUENCES).read_bytes()).decode()
    assert text == "1 2 1\n3 2\n5 3 5\n4 4 4\n6 6\n"
    items = pd.read_parquet(tmp_path / "out" / "joined" / ITEMS)
    assert dict(zip(items["item_id"], items["phrase"], strict=True)) == {
        1: "pot", 2: "cup", 3: "ball", 4: "kite", 5: "doll", 6: "rope",
    }  # fmt: skip
    assert list(items["asin"]) == ["tea/B1", "tea/B2", "toys/B1", "toys/B2", "toys/B3", "rope/B1"]


def test_an_item_without_a_title_still_has_its_number(tmp_path: Path) -> None:
    first = write_shop(tmp_path / "tea", "1 7 2\n", ["pot"])
    join([first, write_shop(tmp_path / "toys", "1 1\n", ["ball"])], tmp_path / "joined")
    assert pd.read_parquet(tmp_path / "joined" / ITEMS)["item_id"].tolist() == [1, 8]


def test_shops_of_one_name_are_refused(tmp_path: Path) -> None:
    shops = [write_shop(tmp_path / place / "toys", "1 1\n", ["ball"]) for place in ("here", "there")]
    with pytest.raises(ConfigError, match="expected folders of different names, got toys, toys; rename one"):
        join(shops, tmp_path / "joined")


def test_a_shop_without_items_is_refused(tmp_path: Path) -> None:
    shops = [write_shop(tmp_path / name, "1 1\n", ["ball"]) for name in ("tea", "toys")]
    (shops[1] / ITEMS).unlink()
    with pytest.raises(
        DataError, match=r"shop .*toys: expected file items\.parquet, got none; see configs/amazon_toys"
    ):
        join(shops, tmp_path / "joined")
    assert not (tmp_path / "joined").exists()
