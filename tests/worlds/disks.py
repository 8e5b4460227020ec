"""A small file system in memory, which fills up; only root may mount one."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["fill", "mount_small_disk", "occupied"]  # the second is the fixture small_disk

SIZE = 32 << 20


@pytest.fixture(name="small_disk")
def mount_small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of SIZE bytes."""
    if os.geteuid():
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, left: int) -> Path:
    """Fill a file system but for these bytes; returns the file to remove."""
    disk = os.statvfs(folder)
    filler = folder / "filler"
    filler.write_bytes(bytes(disk.f_bavail * disk.f_bsize - left))
    return filler


def occupied(folder: Path) -> int:
    """Bytes of the disk that the files of a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*"))
