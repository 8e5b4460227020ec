"""Files and folders by their address: a path of this machine, or a URI of an object store that fsspec can reach.

Nothing but `open_store` knows which; JSON files are replaced whole, and remote inputs are copied to a cache once.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from components.exceptions import ConfigError, DataError, MissingInputError, ReleaseError, UnavailableError

_ABANDONED_SECONDS = 86_400  # the age of a temporary file or folder whose writer is taken for dead
_WAIT_SECONDS = 900.0  # for another process that fetches the same


def is_local(uri: str) -> bool:
    """Whether the URI names a path of this machine."""
    return "://" not in uri or uri.startswith("file://")


def absolute(uri: str) -> str:
    """The URI with a local path made absolute and its `file://` dropped."""
    return str(Path(uri.removeprefix("file://")).absolute()) if is_local(uri) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """The URI of a file beneath another."""
    return "/".join([uri.rstrip("/"), *parts])


def parent(uri: str) -> str:
    """The URI of the folder that holds this one."""
    return uri.rstrip("/").rsplit("/", 1)[0]


def exists(uri: str) -> bool:
    """Whether a file or folder is there.

    Raises:
        UnavailableError: The store does not answer.
    """
    filesystem, path = open_store(uri)
    with store_errors(uri):
        return bool(filesystem.exists(path))


def remove(uri: str) -> None:
    """Delete one file if it is there.

    Raises:
        UnavailableError: The store does not answer.
    """
    filesystem, path = open_store(uri)
    with store_errors(uri):
        if filesystem.exists(path):
            filesystem.rm_file(path)


def read_json(uri: str) -> Any | None:
    """Parsed content of a JSON file, or None if there is no such file.

    Raises:
        DataError: The file is no JSON.
        UnavailableError: The store does not answer.
    """
    filesystem, path = open_store(uri)
    with store_errors(uri):
        try:
            content = filesystem.cat_file(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
    try:
        return json.loads(content)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"file {uri}", expected="JSON", got=str(error), remedy="delete it and run the stage again"
        ) from None


def write_json(uri: str, content: Any) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never a part.

    Raises:
        OSError: The disk refuses it.
        UnavailableError: The store does not answer.
    """
    text = json.dumps(content, indent=2, sort_keys=True, default=str) + "\n"
    if not is_local(uri):
        filesystem, remote_path = open_store(uri)
        with store_errors(uri):
            filesystem.makedirs(parent(remote_path), exist_ok=True)
            filesystem.pipe_file(remote_path, text.encode())
        return
    path = Path(uri.removeprefix("file://"))
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def fetch(uri: str, cache: Path, only: Sequence[str] = ()) -> Path:
    """Local path of a file or folder; a remote one is copied to the cache once.

    The copy appears by one rename, so that processes and pods may share the cache without a lock. Those of one machine
    wait for each other, so that the ranks of a training do not all fetch the same at once.

    Args:
        uri: A path of this machine is left where it is.
        cache: Local folder of the copies.
        only: Files that are needed of a remote folder; all of it if left out.

    Raises:
        MissingInputError: Nothing is there.
        UnavailableError: The store does not answer.
    """
    target = cache / hashlib.sha256("\n".join([uri, *only]).encode()).hexdigest()[:16]
    if not is_local(uri) and target.exists():  # then the store need not answer
        return target
    if not exists(uri):
        raise MissingInputError(
            f"input {uri}", expected="a file or folder", got="nothing", remedy="run the stage that writes it again"
        )
    if is_local(uri):
        return Path(uri.removeprefix("file://"))
    filesystem, path = open_store(uri)
    cache.mkdir(parents=True, exist_ok=True)
    remove_abandoned(cache)
    with _in_turn(cache / f".turn-{target.name}"), tempfile.TemporaryDirectory(prefix=".tmp-", dir=cache) as temporary:
        if target.exists():
            return target
        landing = Path(temporary) / "content"
        with store_errors(uri):
            if only:
                landing.mkdir()
                for name in only:
                    filesystem.get_file(join(path, name), str(landing / name))
            elif filesystem.isdir(path):
                filesystem.get(path.rstrip("/") + "/", str(landing) + "/", recursive=True)
            else:
                filesystem.get_file(path, str(landing))
        try:
            os.rename(landing, target)
        except OSError:
            if not target.exists():  # else another process fetched the same meanwhile
                raise
    return target


@contextmanager
def checked_copy(uri: str, copy: Path) -> Iterator[None]:
    """Remove what `fetch` copied from a URI if the body refuses it: the next attempt sees what the store has then."""
    try:
        yield
    except ReleaseError:
        if not is_local(uri):
            shutil.rmtree(copy, ignore_errors=True)
        raise


def remove_abandoned(folder: Path) -> None:
    """Remove what killed writers left in a folder, files and folders that are named `.tmp-…`."""
    for path in folder.glob(".tmp-*"):
        with suppress(OSError):  # another may have removed it
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def _in_turn(path: Path) -> Iterator[None]:
    """Wait for the processes that came first, where the disk knows locks; it saves work, and nothing relies on it."""
    with path.open("a") as stream:
        deadline = time.monotonic() + _WAIT_SECONDS
        with suppress(OSError):  # a network disk may know no locks
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.1)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def link_file(source: Path, target: Path) -> None:
    """Give a local file a second name, or copy it where the file system cannot."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another device, or a file system without hard links
        shutil.copyfile(source, target)


def open_store(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """File system of a URI, and the path in it."""
    try:
        filesystem, path = fsspec.core.url_to_fs(uri)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"address {uri}",
            expected="a local path or a store that fsspec can reach",
            got=error,
            remedy="fix the address or install the driver it names",
        ) from None
    return filesystem, path


@contextmanager
def store_errors(uri: str) -> Iterator[None]:
    """Turn what the driver of an object store raises into one sentence; each has exceptions of its own.

    What a disk of this machine says is left as it is.
    """
    try:
        yield
    except Exception as error:
        if is_local(uri):
            raise
        raise UnavailableError(
            f"object store of {uri}",
            expected="an answer",
            got=error,
            remedy="correct its address or credentials, or try again later",
        ) from error
