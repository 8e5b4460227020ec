import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from components.exceptions import ConfigError, UnavailableError
from components.items.cache import VectorCache, digest

IDENTITY = "ab" * 32


def keys(*names: str) -> list[bytes]:
    return [digest(name.encode()) for name in names]


def vectors(*values: float) -> np.ndarray:
    return np.array([[value, -value] for value in values], dtype=np.float16)


def open_cache(folder: Path) -> VectorCache:
    return VectorCache(folder, "text", IDENTITY, 2)


def test_what_is_put_is_found_in_any_order_and_repeatedly(tmp_path: Path) -> None:
    open_cache(tmp_path).put(keys("a", "b"), vectors(1, 2))
    got, found = open_cache(tmp_path).get(keys("b", "x", "a", "b"))
    assert found.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(got, [[2, -2], [0, 0], [1, -1], [2, -2]])


def test_more_keys_than_one_query_takes(tmp_path: Path) -> None:
    names = [str(number) for number in range(1234)]
    cache = open_cache(tmp_path)
    cache.put(keys(*names), vectors(*range(1234)))
    got, found = cache.get(keys(*reversed(names)))
    assert found.all()
    assert got[:, 0].tolist() == list(range(1233, -1, -1))


def test_an_encoder_never_sees_the_vectors_of_another(tmp_path: Path) -> None:
    open_cache(tmp_path).put(keys("a"), vectors(1))
    _, found = VectorCache(tmp_path, "text", "cd" * 32, 2).get(keys("a"))
    assert not found.any()


def test_a_flipped_bit_makes_a_row_unknown_and_a_new_put_mends_it(tmp_path: Path) -> None:
    cache = open_cache(tmp_path)
    cache.put(keys("a", "b"), vectors(1, 2))
    connection = sqlite3.connect(cache.path)
    with connection:
        connection.execute("UPDATE vectors SET vector = ? WHERE digest = ?", (vectors(9)[0].tobytes(), keys("a")[0]))
    connection.close()
    got, found = cache.get(keys("a", "b"))
    assert found.tolist() == [False, True]
    assert got[0].tolist() == [0, 0]
    cache.put(keys("a"), vectors(1))
    assert cache.get(keys("a"))[0].tolist() == [[1, -1]]


@pytest.mark.parametrize("damage", ["not a database", "torn pages"])
def test_a_damaged_file_is_found_and_rebuilt(tmp_path: Path, damage: str) -> None:
    cache = open_cache(tmp_path)
    cache.put(keys(*map(str, range(2000))), vectors(*range(2000)))
    if damage == "not a database":
        cache.path.write_bytes(b"x" * 5000)
    else:
        content = bytearray(cache.path.read_bytes())
        content[8192 : len(content) - 4096] = os.urandom(len(content) - 4096 - 8192)
        cache.path.write_bytes(content)

    rebuilt = open_cache(tmp_path)
    assert not rebuilt.get(keys("1"))[1].any()
    rebuilt.put(keys("1"), vectors(1))
    assert open_cache(tmp_path).get(keys("1"))[1].all()


def test_a_killed_writer_loses_nothing_stored_before(tmp_path: Path) -> None:
    writer = textwrap.dedent(f"""
        import itertools, sys
        import numpy as np
        from pathlib import Path
        from components.items.cache import VectorCache, digest
        cache = VectorCache(Path({str(tmp_path)!r}), "text", {IDENTITY!r}, 2)
        for number in itertools.count():
            cache.put([digest(f"{{number}}:{{i}}".encode()) for i in range(200)], np.full((200, 2), number % 100))
            print(number, flush=True)
    """)
    process = subprocess.Popen([sys.executable, "-c", writer], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 5:
            break
    os.kill(process.pid, signal.SIGKILL)  # most likely in the middle of a later put
    stored = [int(line) for line in process.stdout]
    process.wait()
    process.stdout.close()

    cache = open_cache(tmp_path)
    last = stored[-1] if stored else 5
    for number in range(last + 1):
        got, found = cache.get(keys(*(f"{number}:{i}" for i in range(200))))
        assert found.all()
        assert (got == number % 100).all()
    _, torn = cache.get(keys(*(f"{last + 1}:{i}" for i in range(200))))
    assert torn.all() or not torn.any()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"expected a file that can be written, got .*; set URM_CACHE_DIR"):
        open_cache(tmp_path / "file" / "vectors")


def test_a_file_that_is_busy_is_not_taken_for_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(tmp_path)
    cache.put(keys("a"), vectors(1))
    monkeypatch.setattr("components.items.cache._LOCK_SECONDS", 0.1)
    other = sqlite3.connect(cache.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UnavailableError, match="database is locked"):
        open_cache(tmp_path)
    other.rollback()
    other.close()
    assert open_cache(tmp_path).get(keys("a"))[1].all()
