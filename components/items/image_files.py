"""Files of the items' images: their content, and what the stores say of them without a look into them."""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.compute as pc
import pyarrow.parquet as pq

from components.addresses import open_store

_MAX_BYTES = 32 * 2**20  # larger files are no product photos
_LISTINGS_AT_ONCE = 8  # a listing waits for the store, not for a core
_FEW = 20  # so many files of a folder are asked for one by one: it may hold millions of others
_WEB = ("http://", "https://")
_UNLISTED = (*_WEB, "data:")
# What a store or driver says of an address, and would say again; anything else may be over in a moment.
_ANSWERS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, ImportError)
_REFUSALS = set(range(400, 500)) - {408, 425, 429}  # statuses of web servers; those three say "later"
# What changes with a file, by the names that the drivers of stores give it; the last one only where there is no other.
_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


@dataclass(frozen=True)
class Unreadable:
    """Why an image cannot be read."""

    reason: str
    is_answer: bool  # whether reading it again would say the same as long as nobody changes it


def read_image_file(uri: str) -> bytes | Unreadable:
    """Content of an image file, or why it cannot be read."""
    try:
        with fsspec.open(uri, "rb") as stream:
            content: bytes = stream.read(_MAX_BYTES + 1)
    except Exception as error:  # fsspec's drivers raise errors of their own kinds; the reason is reported
        # That of the web says "not found" whatever happened; the cause is what happened.
        said = (error.__cause__ or error) if uri.startswith(_WEB) else error
        is_answer = isinstance(said, _ANSWERS) or getattr(said, "status", None) in _REFUSALS
        return Unreadable(f"{type(said).__name__}: {said}", is_answer)
    return content if len(content) <= _MAX_BYTES else Unreadable(f"larger than {_MAX_BYTES} bytes", is_answer=True)


def fingerprint_images(items: Path) -> str:
    """A hash that changes with the images of an items table: with their addresses, sizes and versions.

    It decides, beside the configuration, whether an earlier result may stand in. Folders are listed and no image is
    read. Web servers list nothing: of http(s) addresses only the address counts, as where a store refuses a listing.
    """
    column = pq.read_table(items, columns=["image_uri"]).column("image_uri")
    uris = sorted(uri for uri in pc.unique(column).to_pylist() if uri)
    versions = _versions(uris)
    digest = hashlib.sha256()
    for uri in uris:
        digest.update(f"{uri} {versions.get(uri, '')}\n".encode())
    return digest.hexdigest()


def _versions(uris: list[str]) -> dict[str, str]:
    """By URI what its store says of the file; nothing for one that is not asked."""
    folders: dict[tuple[fsspec.AbstractFileSystem, str], dict[str, str]] = {}
    versions: dict[str, str] = {}
    for uri in uris:
        if not uri.startswith(_UNLISTED):
            try:
                filesystem, path = open_store(uri)
            except Exception as error:  # some drivers connect already, and each has exceptions of its own
                versions[uri] = _failed(error)
            else:
                folders.setdefault((filesystem, filesystem._parent(path)), {})[uri] = path
    with ThreadPoolExecutor(_LISTINGS_AT_ONCE) as pool:
        listings = pool.map(lambda place: dict(_list_files(place[0], place[1], folders[place])), folders)
        return versions | {uri: version for listing in listings for uri, version in listing.items()}


def _list_files(filesystem: fsspec.AbstractFileSystem, folder: str, paths: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Of files in one folder, URI → path, the URI and the version."""
    filesystem.invalidate_cache(folder)
    try:
        known = {} if len(paths) <= _FEW else {entry["name"]: entry for entry in filesystem.ls(folder, detail=True)}
    except Exception as error:  # each store's driver has exceptions of its own
        yield from ((uri, _failed(error)) for uri in paths)
        return
    for uri, path in paths.items():
        try:
            yield uri, _version(known.get(path) if known else filesystem.info(path))
        except Exception as error:  # as above
            yield uri, _failed(error)


def _version(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "absent"
    return f"{entry.get('size')} {next((entry[name] for name in _VERSIONS if entry.get(name) is not None), None)}"


def _failed(error: Exception) -> str:
    """The version of a file that a store says nothing of."""
    return "absent" if isinstance(error, FileNotFoundError | NotADirectoryError) else "unlisted"
