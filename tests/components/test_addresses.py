"""Files by their address."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from components.addresses import exists, fetch, read_json, remove, write_json
from components.exceptions import MissingInputError, UnavailableError


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
    MemoryFileSystem().rm(uri, recursive=True)
    assert not exists(uri)
    assert fetch(uri, tmp_path / "cache") == fetched  # without its store
    assert fetch(str(fetched), tmp_path / "cache") == fetched


def test_of_a_remote_folder_only_the_files_asked_for_are_fetched(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}/folder"
    for name in ("a", "b", "c"):
        write_json(f"{uri}/{name}.json", {})
    part, whole = fetch(uri, tmp_path / "cache", ("a.json", "b.json")), fetch(uri, tmp_path / "cache")
    assert sorted(path.name for path in part.iterdir()) == ["a.json", "b.json"]
    assert sorted(path.name for path in whole.iterdir()) == ["a.json", "b.json", "c.json"]
    assert fetch(str(whole), tmp_path / "cache", ("a.json",)) == whole


def test_processes_that_need_the_same_fetch_it_once(tmp_path: Path) -> None:
    content = b"x" * 1000
    uri = f"memory://{tmp_path.name}/file"
    MemoryFileSystem().pipe_file(uri, content)
    fetches = []
    get_file = MemoryFileSystem.get_file

    def slow(self: MemoryFileSystem, source: str, target: str, **options: object) -> None:
        fetches.append(source)
        time.sleep(0.5)
        get_file(self, source, target, **options)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(4) as pool:
        patch.setattr(MemoryFileSystem, "get_file", slow)
        found = list(pool.map(lambda _: fetch(uri, tmp_path / "cache"), range(4)))
    assert {path.read_bytes() for path in found} == {content}
    assert len(fetches) == 1
    assert list((tmp_path / "cache").iterdir()) == found[:1]


@pytest.mark.parametrize(
    ("method", "act"),
    [
        ("exists", lambda uri, cache: fetch(uri, cache)),
        ("get_file", lambda uri, cache: fetch(uri, cache)),
        ("cat_file", lambda uri, cache: read_json(uri)),
        ("pipe_file", lambda uri, cache: write_json(uri, {})),
        ("rm_file", lambda uri, cache: remove(uri)),
    ],
)
def test_whatever_a_store_raises_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, act: Callable[[str, Path], object]
) -> None:
    uri = f"memory://{tmp_path.name}/a.json"
    write_json(uri, {})
    assert exists(uri)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("could not connect to the endpoint")  # drivers' exceptions share no base

    monkeypatch.setattr(MemoryFileSystem, method, fail)
    with pytest.raises(UnavailableError, match=rf"object store of {uri}: expected an answer, got could not connect"):
        act(uri, tmp_path / "cache")


def test_a_bucket_that_is_not_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise FileNotFoundError("The specified bucket does not exist")

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", fail)
    with pytest.raises(UnavailableError, match=r"object store of memory://none/a\.json: .*got The specified bucket"):
        write_json("memory://none/a.json", {})


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"input .*nowhere: expected a file or folder, got nothing"):
        fetch(str(tmp_path / "nowhere"), tmp_path)
