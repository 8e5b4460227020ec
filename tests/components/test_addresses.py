"""Files by their address."""

from pathlib import Path
from typing import Any

import pytest

from components.addresses import fetch, read_json, write_json
from components.exceptions import MissingInputError


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.json"
    write_json(str(target), {"a": 1})
    with pytest.raises(ValueError, match="Circular"):
        circle: list[Any] = []
        circle.append(circle)
        write_json(str(target), circle)
    assert read_json(str(target)) == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_remote_folder_is_fetched_once_and_a_local_one_is_left_where_it_is(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/folder"
    write_json(f"{uri}/inner/a.json", {"a": 1})
    fetched = fetch(uri, tmp_path / "cache")
    assert read_json(str(fetched / "inner" / "a.json")) == {"a": 1}
    write_json(f"{uri}/inner/a.json", {"a": 2})
    assert fetch(uri, tmp_path / "cache") == fetched
    assert read_json(str(fetched / "inner" / "a.json")) == {"a": 1}
    assert fetch(str(fetched), tmp_path / "cache") == fetched


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"input .*nowhere: expected a file or folder, got nothing"):
        fetch(str(tmp_path / "nowhere"), tmp_path)
