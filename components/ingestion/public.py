"""Public data sets: their files, each with address, SHA-256 and size (public_data.yaml), downloaded and converted."""

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import pooch
import requests
import yaml
from rich.progress import Progress

from components.exceptions import DataError, UnavailableError, full_disk_errors
from components.ingestion.amazon import write_tables

_CHUNK = 1 << 16
_SECONDS = 30  # without a byte


@dataclass(frozen=True)
class PublicFile:
    """A file that its origin publishes."""

    url: str
    sha256: str
    bytes: int


def read_registry() -> dict[str, dict[str, PublicFile]]:
    """The files of each data set by their name here."""
    sets = yaml.safe_load(files("components.ingestion").joinpath("public_data.yaml").read_text())
    return {name: {key: PublicFile(**entry) for key, entry in entries.items()} for name, entries in sets.items()}


def fetch(name: str, to: Path, cache: Path, registry: dict[str, dict[str, PublicFile]]) -> Path:
    """Download what is missing of a data set, check it, and write its tables to `to/name`; returns that folder.

    Args:
        name: Of the data set.
        to: Folder of data sets.
        cache: Keeps the files of the origins, and the part of one whose download was interrupted.
        registry: As `read_registry` gives it.

    Raises:
        DataError: There is no such data set, or a file is not the one of the registry.
        UnavailableError: An origin does not answer, or the disk is full.
    """
    if name not in registry:
        known = ", ".join(registry)
        raise DataError("public data set", expected=f"one of {known}", got=name, remedy="name one of these")
    raw, folder = cache / name, to / name
    pooch.get_logger().setLevel("WARNING")  # the bar says what it would
    with full_disk_errors(f"disk of {to} or of URM_CACHE_DIR", "the data set"), Progress() as progress:
        raw.mkdir(parents=True, exist_ok=True)
        for key, entry in registry[name].items():
            _download(key, entry, raw, progress)
        to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to, prefix=f".{name}-") as temporary:
            write_tables(name, raw, Path(temporary))
            folder.mkdir(exist_ok=True)
            for path in sorted(Path(temporary).iterdir()):
                path.replace(folder / path.name)
    return folder


def _download(key: str, entry: PublicFile, raw: Path, progress: Progress) -> None:
    """Leave a file of the registry in `raw`; Pooch downloads it, unless it is there, and compares the SHA-256."""
    task = progress.add_task(key, total=entry.bytes)

    def resume(url: str, output_file: str, _: object) -> None:
        part = raw / f"{key}.part"
        _continue(url, part, entry.bytes, lambda size: progress.update(task, completed=size))
        os.replace(part, output_file)

    origin = pooch.create(path=raw, base_url="", registry={key: entry.sha256}, urls={key: entry.url})
    try:
        origin.fetch(key, downloader=resume)
    except requests.RequestException as error:
        raise UnavailableError(
            entry.url,
            expected=f"a file of {entry.bytes} bytes",
            got=error,
            remedy="check the network and start again, the download goes on where it stopped",
        ) from error
    except ValueError as error:
        raise DataError(
            entry.url,
            expected=f"SHA-256 {entry.sha256}",
            got="other bytes, which were deleted",
            remedy="start again; if it stays, the origin has changed its file",
        ) from error
    progress.update(task, completed=entry.bytes)


def _continue(url: str, part: Path, size: int, report: Callable[[int], None]) -> None:
    """Append to a part what it lacks; an origin that knows no ranges sends the whole."""
    have = part.stat().st_size if part.exists() else 0
    if have >= size:  # of a run that ended before the check
        return
    headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}
    with requests.get(url, headers=headers, stream=True, timeout=_SECONDS) as answer:
        answer.raise_for_status()
        resumed = answer.status_code == requests.codes.partial_content
        with part.open("ab" if resumed else "wb") as file:
            for chunk in answer.iter_content(_CHUNK):
                file.write(chunk)
                report(file.tell())
