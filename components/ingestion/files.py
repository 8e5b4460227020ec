"""The source's files, local or on an object store, and whether they changed since an earlier run."""

import hashlib
import uuid

import fsspec
import ibis
import ibis.expr.types as ir
from sqlglot import exp

from components.addresses import store_errors
from components.config import CompleteJourneySource, SequenceSource, Source
from components.exceptions import DataError

GLOB_REMEDY = "check the path or glob"
PUBLIC_FILES_REMEDY = "set source.data_dir to the folder of the public files"


def find_files(table: str, pattern: str, remedy: str = GLOB_REMEDY) -> tuple[fsspec.AbstractFileSystem, list[str]]:
    """Files that match a path or glob, sorted; local ones as plain paths, others with their protocol.

    Raises:
        DataError: Nothing matches, a folder does, or the protocol is unknown.
        UnavailableError: The object store does not answer.
    """
    subject = f"source.{table} {pattern}"
    try:
        filesystem, path = fsspec.core.url_to_fs(pattern)
        with store_errors(pattern):
            known = filesystem.glob(path, detail=True) if pattern else {}
    except (ValueError, ImportError, OSError) as error:
        raise DataError(subject, expected="a path or glob that can be listed", got=error, remedy="check it") from error
    found = sorted(known)
    folders = [one for one in found if known[one]["type"] == "directory"]
    if not found:
        raise DataError(subject, expected="at least one file", got="none", remedy=remedy)
    if folders:
        raise DataError(
            subject,
            expected="files",
            got=f"a folder, {folders[0]}",
            remedy=f"name its files, as in {folders[0]}/*.parquet",
        )
    local = "file" in filesystem.protocol
    return filesystem, found if local else [filesystem.unstrip_protocol(path) for path in found]


def open_found(
    connection: ibis.BaseBackend, filesystem: fsspec.AbstractFileSystem, paths: list[str], name: str, reader: str
) -> ir.Table:
    """A view of what `find_files` found.

    By DuckDB's SQL: for s3:// Ibis downloads an extension, though the file system is registered, and DuckDB's own
    Python functions can wait for themselves on one that is (1.5).

    Args:
        connection: DuckDB.
        filesystem: Of the files.
        paths: The files.
        name: Of the view.
        reader: Function and options in SQL, with `{}` for the list of the files: `read_csv({}, header = false)`.
    """
    protocol = filesystem.protocol if isinstance(filesystem.protocol, str) else filesystem.protocol[0]
    if "file" not in filesystem.protocol and not connection.con.filesystem_is_registered(protocol):
        connection.register_filesystem(filesystem)
    files = exp.array(*map(exp.Literal.string, paths)).sql("duckdb")
    view = f'CREATE OR REPLACE TEMP VIEW "{name}" AS SELECT * FROM {reader.replace("{}", files, 1)}'  # noqa: S608  # quoted by sqlglot
    connection.raw_sql(view)
    return connection.table(name)


def fingerprint_files(source: Source) -> str:
    """A hash that changes with the names, sizes or versions of the source's files.

    It decides, beside the configuration, whether an earlier result may stand in. The packaged log never changes: "".

    Raises:
        DataError: A path or glob matches nothing.
        UnavailableError: The object store does not answer.
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
        with store_errors(pattern):
            for path in paths:
                digest.update(f"{table} {path} {_version(filesystem, path)}\n".encode())
    return digest.hexdigest() if patterns else ""


def _version(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    """What changes with a file's content; a new one each time where a web server tells nothing of it.

    That of a web address is in its headers: `ukey` takes such files for unchangeable.
    """
    if "http" not in filesystem.protocol:
        return str(filesystem.ukey(path))
    headers = filesystem.info(path)
    known = [headers.get(name) for name in ("ETag", "Last-Modified", "Content-MD5", "Digest", "size")]
    return str(known) if any(known) else uuid.uuid4().hex
