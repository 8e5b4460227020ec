import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from components.caches import CachePlace
from components.exceptions import ConfigError
from components.items.cache import VectorCache, digest

IDENTITY = "ab" * 32


def keys(*names: str) -> list[bytes]:
    return [digest(name.encode()) for name in names]


def vectors(*values: float) -> np.ndarray:
    return np.array([[value, -value] for value in values], dtype=np.float16)


def open_cache(folder: Path, shared: str = "") -> VectorCache:
    return VectorCache(CachePlace(folder, shared), "text", IDENTITY, 2)


def parts(folder: Path) -> list[Path]:
    return sorted((folder / f"text-{IDENTITY[:16]}").iterdir())


def test_what_is_put_is_found_in_any_order_and_repeatedly(tmp_path: Path) -> None:
    open_cache(tmp_path).put(keys("a", "b"), vectors(1, 2))
    got, found = open_cache(tmp_path).get([*keys("b", "x", "a"), b"", *keys("b")])
    assert found.tolist() == [True, False, True, False, True]
    np.testing.assert_array_equal(got, [[2, -2], [0, 0], [1, -1], [0, 0], [2, -2]])


def test_vectors_of_many_parts(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    names = [str(number) for number in range(1234)]
    for start in range(0, 1234, 100):
        cache.put(keys(*names[start : start + 110]), vectors(*range(start, min(start + 110, 1234))))
    for reader in (cache, open_cache(tmp_path)):
        got, found = reader.get(keys(*reversed(names)))
        assert found.all()
        assert got[:, 0].tolist() == list(range(1233, -1, -1))


def test_what_another_process_stores_meanwhile_is_found(tmp_path: Path) -> None:
    one, other = open_cache(tmp_path), open_cache(tmp_path)
    assert not one.get(keys("a"))[1].any()
    other.put(keys("a"), vectors(1))
    assert one.get(keys("a"))[0].tolist() == [[1, -1]]


def test_an_encoder_never_sees_the_vectors_of_another(tmp_path: Path) -> None:
    open_cache(tmp_path).put(keys("a"), vectors(1))
    _, found = VectorCache(CachePlace(tmp_path), "text", "cd" * 32, 2).get(keys("a"))
    assert not found.any()


def damage(part: Path) -> None:
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)


def test_a_damaged_part_is_unknown_and_a_new_put_mends_it(tmp_path: Path) -> None:
    open_cache(tmp_path).put(keys("a", "b"), vectors(1, 2))
    open_cache(tmp_path).put(keys("c"), vectors(3))
    for part in parts(tmp_path):
        if part.stat().st_size == max(one.stat().st_size for one in parts(tmp_path)):
            damage(part)
    cache = open_cache(tmp_path)
    got, found = cache.get(keys("a", "b", "c"))
    assert found.tolist() == [False, False, True]
    assert got.tolist() == [[0, 0], [0, 0], [3, -3]]
    cache.put(keys("a", "b"), vectors(1, 2))
    assert open_cache(tmp_path).get(keys("a", "b", "c"))[1].all()


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_pods_with_a_disk_of_their_own_share_parts(tmp_path: Path, kind: str) -> None:
    shared = f"memory://{tmp_path.name}/cache" if kind == "memory" else str(tmp_path / "shared")
    one, two = (open_cache(tmp_path / name, shared) for name in ("one", "two"))
    assert not two.get(keys("a"))[1].any()  # the shared place is still empty
    one.put(keys("a", "b"), vectors(1, 2))
    got, found = two.get(keys("b", "x"))
    assert (found.tolist(), got.tolist()) == ([True, False], [[2, -2], [0, 0]])
    two.put(keys("a", "b"), vectors(1, 2))  # of the same content: the same part
    assert len(parts(tmp_path / "one")) == len(parts(tmp_path / "two")) == 1


def test_a_damaged_part_of_the_shared_place_is_removed_and_stored_again(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    open_cache(tmp_path / "one", str(shared)).put(keys("a"), vectors(1))
    damage(*parts(shared))
    two = open_cache(tmp_path / "two", str(shared))
    assert not two.get(keys("a"))[1].any()
    assert parts(tmp_path / "two") == parts(shared) == []
    two.put(keys("a"), vectors(1))
    assert open_cache(tmp_path / "three", str(shared)).get(keys("a"))[1].all()


def test_without_its_shared_place_a_pod_works_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path, f"memory://{tmp_path.name}/cache")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("could not connect to the endpoint")  # drivers' exceptions share no base

    monkeypatch.setattr(MemoryFileSystem, "ls", fail)
    monkeypatch.setattr(MemoryFileSystem, "put_file", fail)
    assert not cache.get(keys("a"))[1].any()
    cache.put(keys("a"), vectors(1))
    assert cache.get(keys("a"))[1].all()


WRITER = """
import sys
from pathlib import Path
import numpy as np
from components.caches import CachePlace
from components.items.cache import VectorCache, digest, in_any_order

place = CachePlace(Path(sys.argv[1]), sys.argv[2])
cache = VectorCache(place, "text", sys.argv[3], 2)
for number in in_any_order(range(int(sys.argv[4]))):
    digests = [digest(f"{number}:{i}".encode()) for i in range(200)]
    if not cache.get(digests)[1].all():
        cache.put(digests, np.full((200, 2), number % 100))
    print(number, flush=True)
"""


def start_writer(folder: Path, shared: str, num_parts: int) -> subprocess.Popen[str]:
    arguments = [str(folder), shared, IDENTITY, str(num_parts)]
    return subprocess.Popen([sys.executable, "-c", WRITER, *arguments], stdout=subprocess.PIPE, text=True)


def test_a_killed_writer_loses_nothing_stored_before_and_leaves_no_half_part(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "pod", str(tmp_path / "shared"), 100_000)
    assert process.stdout is not None
    with process.stdout as lines:
        stored = [int(next(lines)) for _ in range(6)]
        os.kill(process.pid, signal.SIGKILL)  # most likely in the middle of a later put
        stored += [int(line) for line in lines]
    process.wait()
    for cache in (open_cache(tmp_path / "pod"), open_cache(tmp_path / "other pod", str(tmp_path / "shared"))):
        for number in stored:
            got, found = cache.get(keys(*(f"{number}:{i}" for i in range(200))))
            assert found.all()
            assert (got == number % 100).all()
        rows = cache.get(keys(*(f"{number}:0" for number in range(100_000))))[1].sum()
        assert rows in (len(stored), len(stored) + 1)


@pytest.mark.parametrize("disk", ["shared by both", "of each its own"])
def test_processes_that_store_the_same_at_once_agree(tmp_path: Path, disk: str) -> None:
    shared = "" if disk == "shared by both" else str(tmp_path / "shared")
    folders = [tmp_path / ("pod" if disk == "shared by both" else f"pod {number}") for number in range(2)]
    for process in [start_writer(folder, shared, 60) for folder in folders]:
        assert process.communicate()[0].count("\n") == 60
        assert process.returncode == 0
    for folder in (*folders, tmp_path / "new pod" if shared else folders[0]):
        got, found = open_cache(folder, shared).get(keys(*(f"{number}:7" for number in range(60))))
        assert found.all()
        assert got[:, 0].tolist() == [number % 100 for number in range(60)]


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"expected a folder that can be written, got .*; set URM_CACHE_DIR"):
        open_cache(tmp_path / "file" / "vectors")
