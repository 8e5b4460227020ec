"""Temporary output folder of one attempt, and the folders that attempts share.

On one machine a lock keeps a second attempt out. In a remote run directory the newest attempt goes on, since the one
before it may run on a node that nobody reaches any more: each notes its id there, and one that finds another id ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import tempfile
import uuid
from contextlib import suppress
from pathlib import Path

import structlog

from components.addresses import is_local, join, open_store, store_errors
from components.exceptions import DataError, UnavailableError
from components.settings import Settings

log = structlog.get_logger()

_OWNER = ".attempt"


class Workspace:
    """Temporary output folder of one attempt, and the folders that attempts share."""

    def __init__(self, run_dir: str, stage: str, work_fingerprint: str, settings: Settings) -> None:
        self.remote = not is_local(run_dir)
        base = settings.cache_path / "work" / hashlib.sha256(run_dir.encode()).hexdigest()[:12]
        # Pods may share the cache: each machine has a folder of its own there.
        self.root = base / stage / platform.node() if self.remote else Path(run_dir) / stage
        self.scratch = self.root / f".scratch-{work_fingerprint[:16]}"
        self.checkpoints = join(run_dir, stage, f".checkpoints-{work_fingerprint[:16]}") if self.remote else ""
        self.output = Path()
        self.stage_uri = join(run_dir, stage)
        self.attempt = uuid.uuid4().hex
        self.succeeds_another = False  # an attempt before this one has left its note: it died, or does not know yet
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
        if self.remote and self.leads:
            self._remove_dead()
            try:
                with store_errors(self.stage_uri):
                    self._take_over()
            except UnavailableError:
                self._release_lock()
                raise
        return self

    def _remove_dead(self) -> None:
        """Remove what attempts on other machines left in a shared cache; one that runs holds its lock."""
        for other in self.root.parent.glob("*/.lock"):
            if other.parent != self.root:
                with suppress(OSError), other.open("a") as stream:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(other.parent, ignore_errors=True)

    def _take_over(self) -> None:
        self.succeeds_another = self._owner() is not None
        filesystem, path = open_store(self.stage_uri)
        filesystem.makedirs(path, exist_ok=True)
        filesystem.pipe_file(f"{path}/{_OWNER}", self.attempt.encode())

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

    def _owner(self) -> str | None:
        filesystem, path = open_store(self.stage_uri)
        try:
            return str(filesystem.cat_file(f"{path}/{_OWNER}").decode())
        except FileNotFoundError:
            return None

    def is_current(self) -> bool:
        """Whether no other attempt has taken over."""
        return not (self.remote and self.leads) or self._owner() == self.attempt

    def require_current(self) -> None:
        """Stop an attempt that another one has replaced.

        Raises:
            UnavailableError: Another attempt has taken over.
        """
        if not self.is_current():
            raise UnavailableError(
                f"stage folder {self.stage_uri}",
                expected="one attempt at a time",
                got="another attempt that has taken over",
                remedy="leave the work to it",
            )

    def publish(self, folder: str, outputs: dict[str, str]) -> None:
        """Move the output folder to its place, once every output that is reported lies in it."""
        for name, relative in outputs.items():
            if not (self.output / relative).exists():
                raise FileNotFoundError(f"stage {self.root.name} reports output {name!r} but wrote no {relative}")
        if not self.leads:
            return
        self.require_current()
        if self.remote:
            filesystem, path = open_store(folder)
            with store_errors(folder):
                if filesystem.exists(path):
                    filesystem.rm(path, recursive=True)
                filesystem.put(str(self.output) + "/", path, recursive=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(self.output, folder)
        self.require_current()

    def remove_checkpoints(self) -> None:
        """Remove what attempts of this stage folder share, after success; those of other fingerprints are stale."""
        if not self.leads:
            return
        for scratch in self.root.parent.glob("*/.scratch-*") if self.remote else self.root.glob(".scratch-*"):
            shutil.rmtree(scratch, ignore_errors=True)
        if not self.remote:
            return
        try:
            filesystem, path = open_store(self.stage_uri)
            filesystem.invalidate_cache()
            for entry in filesystem.ls(path, detail=False):
                if entry.rstrip("/").rsplit("/", 1)[1].startswith(".checkpoints-"):
                    filesystem.rm(entry, recursive=True)
        except Exception as error:  # each driver has errors of its own; the result stands
            log.warning("checkpoints are left over", folder=self.stage_uri, error=str(error))

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        self._release_lock()
        if self.remote and self.leads:
            try:
                if self.is_current():
                    filesystem, path = open_store(self.stage_uri)
                    filesystem.rm_file(f"{path}/{_OWNER}")
            except Exception as error:
                log.warning("note of this attempt is left over", folder=self.stage_uri, error=str(error))


def _unwritable(path: object, error: OSError) -> DataError:
    return DataError(
        f"run directory {path}",
        expected="a folder that can be written",
        got=error.strerror or error,
        remedy="choose another --run-dir",
    )
