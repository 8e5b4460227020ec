import errno
import os
import time
from pathlib import Path

import pytest

from components.caches import folder_errors, make_folder, write_whole
from components.exceptions import UnavailableError


def test_a_folder_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "entry"

    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise KeyError

    def fill(folder: Path) -> None:
        assert not target.exists()
        (folder / "file").write_text("one")

    with pytest.raises(KeyError):
        make_folder(target, fail)
    assert list(target.parent.iterdir()) == []
    make_folder(target, fill)
    assert (target / "file").read_text() == "one"


def test_of_two_that_make_a_folder_at_once_the_first_stays(tmp_path: Path) -> None:
    target = tmp_path / "entry"

    def fill(folder: Path) -> None:
        (folder / "file").write_text("two")
        make_folder(target, lambda other: other.joinpath("file").write_text("one") and None)

    make_folder(target, fill)
    assert (target / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


def test_what_killed_writers_left_is_removed_and_what_others_write_now_is_not(tmp_path: Path) -> None:
    for name in (".tmp-file", "entry"):
        (tmp_path / name).write_text("")
    for name in (".tmp-folder", ".tmp-young"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-folder" / "file").write_text("")
    old = time.time() - 2 * 86_400
    for name in (".tmp-file", ".tmp-folder", "entry"):
        os.utime(tmp_path / name, (old, old))
    with write_whole(tmp_path / "new") as temporary:
        temporary.rename(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-young", "entry", "new"]


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path) -> None:
    with (
        pytest.raises(UnavailableError, match=r"cache .*, got No space left on device; free the disk\."),
        folder_errors(tmp_path),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
