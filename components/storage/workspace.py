"""Temporary output folder of one attempt, and the scratch folder that attempts share."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from components.addresses import is_local, open_store
from components.exceptions import DataError, UnavailableError
from components.settings import Settings


class Workspace:
    """Temporary output folder of one attempt, and the scratch folder that attempts share."""

    def __init__(self, run_dir: str, stage: str, work_fingerprint: str, settings: Settings) -> None:
        self.remote = not is_local(run_dir)
        base = settings.cache_path / "work" / hashlib.sha256(run_dir.encode()).hexdigest()[:12]
        self.root = base / stage if self.remote else Path(run_dir) / stage
        self.scratch = self.root / f".scratch-{work_fingerprint[:16]}"
        self.output = Path()
        self.leads = settings.process == 0
        self.lock: int | None = None

    def __enter__(self) -> Workspace:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            if self.leads:
                self._take_lock()
                for left_over in self.root.glob(".tmp-*"):
                    shutil.rmtree(left_over, ignore_errors=True)
            self.scratch.mkdir(exist_ok=True)
            self.output = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self.root if self.leads else None))
            self.output.chmod(0o755)
        except OSError as error:
            self._release_lock()
            raise _unwritable(self.root, error) from None
        return self

    def _take_lock(self) -> None:
        # The kernel drops the lock with the process, so that a killed attempt never blocks the next one.
        self.lock = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release_lock()
            raise UnavailableError(
                f"stage folder {self.root}",
                expected="one attempt at a time",
                got="another process at work in it",
                remedy="wait for it to end or use another --run-dir",
            ) from None

    def _release_lock(self) -> None:
        if self.lock is not None:
            os.close(self.lock)
            self.lock = None

    def publish(self, folder: str, outputs: dict[str, str]) -> None:
        """Move the output folder to its place, once every output that is reported lies in it."""
        for name, relative in outputs.items():
            if not (self.output / relative).exists():
                raise FileNotFoundError(f"stage {self.root.name} reports output {name!r} but wrote no {relative}")
        if not self.leads:
            return
        if self.remote:
            filesystem, path = open_store(folder)
            if filesystem.exists(path):
                filesystem.rm(path, recursive=True)
            filesystem.put(str(self.output) + "/", path, recursive=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(self.output, folder)
        for scratch in self.root.glob(".scratch-*"):
            shutil.rmtree(scratch, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self._release_lock()


def _unwritable(path: object, error: OSError) -> DataError:
    return DataError(
        f"run directory {path}",
        expected="a folder that can be written",
        got=error.strerror or error,
        remedy="choose another --run-dir",
    )
