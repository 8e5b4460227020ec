"""A cache of content vectors on disk, keyed by what was encoded: one SQLite file per encoder.

SQLite gives what the cache must promise: a store is a transaction, so that a killed process loses nothing stored
before; processes may share it; damage is found. A checksum per row finds flipped bits that SQLite itself does not.
"""

import hashlib
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import structlog

from components.exceptions import ConfigError, UnavailableError

log = structlog.get_logger()

_STORED = np.dtype("<f2")
_KEYS_PER_QUERY = 500  # below SQLite's limit on bound variables
_LOCK_SECONDS = 60.0


def digest(content: bytes) -> bytes:
    """Key of a content: its SHA-256."""
    return hashlib.sha256(content).digest()


class VectorCache:
    """Content digest → float16 vector [dimension], for one encoder.

    `encoder` is a name for people, e.g. "text"; `identity` is a hex digest of all that decides the encoder's vectors.

    Raises:
        ConfigError: The file cannot be written.
        UnavailableError: Another process keeps it locked, or the disk is full (raised by `get` and `put` too).
    """

    def __init__(self, folder: Path, encoder: str, identity: str, dimension: int) -> None:
        self.path = folder / f"{encoder}-{identity[:16]}.sqlite"
        self.dimension = dimension
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise self._unusable(error) from error
        self._open_or_rebuild()

    def get(self, digests: Sequence[bytes]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Stored vectors float16 [m, d], zero where nothing (or nothing sound) is stored, and found bool [m]."""
        vectors = np.zeros((len(digests), self.dimension), dtype=np.float16)
        found = np.zeros(len(digests), dtype=bool)
        positions: dict[bytes, list[int]] = {}
        for position, key in enumerate(digests):
            positions.setdefault(key, []).append(position)
        keys = list(positions)
        with self._connect() as connection:
            for start in range(0, len(keys), _KEYS_PER_QUERY):
                part = keys[start : start + _KEYS_PER_QUERY]
                marks = ",".join("?" * len(part))
                rows = connection.execute(
                    f"SELECT digest, vector, checksum FROM vectors WHERE digest IN ({marks})",  # noqa: S608 - only "?"
                    part,
                )
                for key, vector, checksum in rows:
                    if _checksum(key, vector) == checksum and len(vector) == self.dimension * _STORED.itemsize:
                        vectors[positions[key]] = np.frombuffer(vector, dtype=_STORED)
                        found[positions[key]] = True
        return vectors, found

    def put(self, digests: Sequence[bytes], vectors: npt.NDArray[np.float16]) -> None:
        """Store vectors [m, d], all of them or none; replaces what was there."""
        blobs = [row.tobytes() for row in np.ascontiguousarray(vectors, dtype=_STORED)]
        rows = [(key, blob, _checksum(key, blob)) for key, blob in zip(digests, blobs, strict=True)]
        with self._connect() as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO vectors VALUES (?, ?, ?)", rows)

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=_LOCK_SECONDS)) as connection:
                yield connection
        except sqlite3.OperationalError as error:
            if error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_FULL", "SQLITE_IOERR")):
                raise UnavailableError(
                    f"vector cache {self.path}",
                    expected="a store within a minute",
                    got=error,
                    remedy="free the disk or wait for the other process",
                ) from error
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"vector cache {self.path}",
            expected="a file that can be written",
            got=error,
            remedy="set URM_CACHE_DIR to a folder of yours",
        )

    def _open_or_rebuild(self) -> None:
        try:
            self._create()
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorname not in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
                raise
            log.warning("vector cache is damaged, starting it anew", path=str(self.path), error=str(error))
            self.path.unlink()
            self.path.with_name(self.path.name + "-journal").unlink(missing_ok=True)
            self._create()

    def _create(self) -> None:
        with self._connect() as connection:
            (state,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if state != "ok":
                damage = sqlite3.DatabaseError(state)
                damage.sqlite_errorname = "SQLITE_CORRUPT"
                raise damage
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS vectors"
                    " (digest BLOB PRIMARY KEY, vector BLOB NOT NULL, checksum INTEGER NOT NULL) WITHOUT ROWID"
                )


def _checksum(key: bytes, vector: bytes) -> int:
    return zlib.crc32(vector, zlib.crc32(key))
