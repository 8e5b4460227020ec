"""The source's files, local or on an object store, and whether they changed since an earlier run."""

import hashlib

import fsspec

from components.config import CompleteJourneySource, SequenceSource, Source
from components.exceptions import DataError

GLOB_REMEDY = "check the path or glob"
PUBLIC_FILES_REMEDY = "set source.data_dir to the folder of the public files"


def find_files(table: str, pattern: str, remedy: str = GLOB_REMEDY) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """Files that match a path or glob, sorted; local ones as plain paths, others with their protocol.

    Raises:
        DataError: Nothing matches, or the protocol is unknown.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        found = sorted(filesystem.glob(path))
    except (ValueError, ImportError, OSError) as error:
        raise DataError(
            f"source.{table} {pattern}", expected="a path or glob that can be listed", got=error, remedy="check it"
        ) from error
    if not found:
        raise DataError(f"source.{table} {pattern}", expected="at least one file", got="none", remedy=remedy)
    local = "file" in filesystem.protocol
    return filesystem, found if local else [filesystem.unstrip_protocol(path) for path in found]


def fingerprint_files(source: Source) -> str:
    """A hash that changes with the names, sizes or versions of the source's files.

    It decides, beside the configuration, whether an earlier result may stand in. The packaged log never changes: "".

    Raises:
        DataError: A path or glob matches nothing.
    """
    if isinstance(source, CompleteJourneySource):
        patterns = {"data_dir": f"{source.data_dir}/*.parquet"} if source.data_dir else {}
    elif isinstance(source, SequenceSource):
        patterns = {"sequences": source.sequences_path, "items": source.items_path}
    else:
        patterns = {"events": source.events, "items": source.items}
    remedy = PUBLIC_FILES_REMEDY if isinstance(source, SequenceSource) else GLOB_REMEDY
    digest = hashlib.sha256()
    for table, pattern in patterns.items():
        filesystem, paths = find_files(table, pattern, remedy)
        for path in paths:
            digest.update(f"{table} {path} {filesystem.ukey(path)}\n".encode())
    return digest.hexdigest() if patterns else ""
