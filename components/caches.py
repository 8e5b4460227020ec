"""Caches keyed by content: a folder of this machine, and beside it a place that many pods share.

An entry of the shared place is one file that never changes; its name ends with the SHA-256 of its content. It appears
whole or not at all: by one rename in a folder, by one put in an object store. So nobody takes a lock, which a network
disk may not keep. Two pods that compute the same at once store two entries, or one twice; a damaged entry is known by
its name. What goes wrong with the shared place is a warning: without it the work is done again.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog

from components.addresses import is_local, join, open_store, remove_abandoned
from components.exceptions import ConfigError, UnavailableError
from components.settings import Settings

log = structlog.get_logger()

_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class CachePlace:
    """Where one cache lies.

    Attributes:
        folder: On this machine, or on a disk that other pods mount too.
        shared: URI of a folder; empty where there is none.
    """

    folder: Path
    shared: str = ""

    @classmethod
    def of(cls, settings: Settings) -> CachePlace:
        """The root of all caches."""
        return cls(settings.cache_path, settings.cache_uri)

    def __truediv__(self, name: str) -> CachePlace:
        return CachePlace(self.folder / name, join(self.shared, name) if self.shared else "")


class SharedCache:
    """The entries of one folder of the shared place; without a URI it is empty and takes nothing.

    Raises:
        ConfigError: fsspec cannot reach such an address.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        if uri:
            self._filesystem, self._root = open_store(uri)

    @property
    def exists(self) -> bool:
        """Whether there is a shared place."""
        return bool(self._uri)

    def names(self) -> list[str]:
        """Names of its entries, as they are now."""
        if not self._uri:
            return []
        try:
            self._filesystem.invalidate_cache(self._root)
            found = [str(path).rsplit("/", 1)[-1] for path in self._filesystem.ls(self._root, detail=False)]
        except FileNotFoundError:
            return []
        except Exception as error:  # each store's driver has exceptions of its own
            self._warn("cannot be listed", error=str(error))
            return []
        return sorted(name for name in found if not name.startswith("."))

    def pull(self, name: str, target: Path) -> bool:
        """Copy an entry to a file of this machine; false, with a warning, if it is damaged or cannot be read.

        A damaged entry is removed, so that it is stored again.
        """
        with write_whole(target) as temporary:
            try:
                self._filesystem.get_file(join(self._root, name), str(temporary))
            except Exception as error:  # as above
                self._warn("cannot be read", entry=name, error=str(error))
                return False
            sound = is_sound(temporary, name)
            if sound:
                os.replace(temporary, target)
        if not sound:
            self._warn("has a damaged entry, not used", entry=name)
            with suppress(Exception):  # another may have removed it
                self._filesystem.rm_file(join(self._root, name))
        return sound

    def push(self, source: Path, name: str) -> None:
        """Store a file of this machine under a name that `name_entry` made."""
        if not self._uri:
            return
        try:
            if is_local(self._uri):
                target = Path(self._root) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with write_whole(target) as temporary:
                    shutil.copyfile(source, temporary)
                    os.replace(temporary, target)
            else:
                self._filesystem.put_file(str(source), join(self._root, name))
        except Exception as error:  # as above
            self._warn("takes no entry", entry=name, error=str(error))

    def _warn(self, what: str, **fields: str) -> None:
        log.warning(f"shared cache {what}", cache=self._uri, **fields)


def hash_file(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def name_entry(file: Path, key: str, suffix: str) -> str:
    """Name of a file as an entry: its key, if it has one besides its content, and the SHA-256 of the content."""
    return "-".join(part for part in (key, f"{hash_file(file)}{suffix}") if part)


def is_sound(file: Path, name: str) -> bool:
    """Whether a file's content is that which the entry's name says."""
    return hash_file(file) == name.rsplit("-", 1)[-1].partition(".")[0]


@contextmanager
def write_whole(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to and rename; what still lies there at the end is removed.

    Works on a network disk: a rename within a folder is one step for all who mount it.
    """
    remove_abandoned(target.parent)
    descriptor, name = tempfile.mkstemp(prefix=_TEMPORARY, dir=target.parent)
    os.close(descriptor)
    os.chmod(name, 0o644)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def make_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all; if another process made it meanwhile, that one stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=target.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        os.rename(temporary, target)
    except OSError:
        if not target.exists():
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk of a cache's folder refuses into one sentence."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
        kind = UnavailableError if full else ConfigError
        raise kind(
            f"cache {folder}",
            expected="a folder that can be written",
            got=error.strerror or error,
            remedy="free the disk" if full else "set URM_CACHE_DIR to a folder of yours",
        ) from error
