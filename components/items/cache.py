"""A cache of content vectors, keyed by what was encoded: immutable files of one part of vectors each, per encoder.

A part is stored whole or not at all, so that a killed process loses nothing stored before; processes and pods may
share the folder, on a network disk too, since nothing in it is ever changed and nobody takes a lock. A part's name is
the SHA-256 of its content, which is checked when it is first read. See `components.caches` for the shared place.
"""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import structlog
from safetensors.numpy import load_file, save

from components.caches import CachePlace, SharedCache, folder_errors, is_sound, name_entry, write_whole

log = structlog.get_logger()

Part = TypeVar("Part")

_SUFFIX = ".safetensors"
_DIGEST_BYTES = 32
_PULLS_AT_ONCE = 8  # a pull waits for the store, not for a core


def digest(content: bytes) -> bytes:
    """Key of a content: its SHA-256."""
    return hashlib.sha256(content).digest()


def in_any_order(parts: Sequence[Part]) -> list[Part]:
    """The parts shuffled: processes that encode the same at once begin elsewhere and find what the others stored."""
    return [parts[number] for number in np.random.default_rng().permutation(len(parts))]


class VectorCache:
    """Content digest → float16 vector [dimension], for one encoder.

    `encoder` is a name for people, e.g. "text"; `identity` is a hex digest of all that decides the encoder's vectors.

    Raises:
        ConfigError: The folder cannot be written.
        UnavailableError: The disk is full (raised by `get` and `put` too).
    """

    def __init__(self, place: CachePlace, encoder: str, identity: str, dimension: int) -> None:
        place = place / f"{encoder}-{identity[:16]}"
        self.folder = place.folder
        self.dimension = dimension
        self._shared = SharedCache(place.shared)
        self._parts: list[Path] = []
        self._seen: set[str] = set()
        self._refused: set[str] = set()  # damaged parts of the shared place
        # Of every stored vector: the first 8 bytes of its digest, sorted, and its part and row in it.
        self._heads = np.zeros(0, dtype=np.uint64)
        self._places = np.zeros((0, 2), dtype=np.int64)
        with folder_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, digests: Sequence[bytes]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Stored vectors float16 [m, d], zero where nothing (or nothing sound) is stored, and found bool [m].

        What other processes stored meanwhile is found too. An empty digest is never found.
        """
        wanted = np.frombuffer(b"".join(key or bytes(_DIGEST_BYTES) for key in digests), dtype=np.uint8)
        wanted = wanted.reshape(-1, _DIGEST_BYTES)
        with folder_errors(self.folder):
            self._read_new()
            vectors, found = self._look_up(wanted)
            if not found.all() and self._pull_new():
                self._read_new()
                vectors, found = self._look_up(wanted)
        return vectors, found

    def put(self, digests: Sequence[bytes], vectors: npt.NDArray[np.float16]) -> None:
        """Store vectors [m, d], all of them or none."""
        keys = np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_BYTES)
        part: dict[str, npt.NDArray[Any]] = {
            "digests": keys,
            "vectors": np.ascontiguousarray(vectors, dtype=np.float16),
        }
        with folder_errors(self.folder), write_whole(self.folder / "part") as temporary:
            temporary.write_bytes(save(part))
            name = name_entry(temporary, "", _SUFFIX)
            temporary.rename(self.folder / name)
        self._shared.push(self.folder / name, name)

    def _pull_new(self) -> bool:
        """Copy the parts of the shared place that this machine lacks; whether there were any."""
        present = {path.name for path in self.folder.glob(f"*{_SUFFIX}")} | self._refused
        missing = [name for name in self._shared.names() if name not in present]
        with ThreadPoolExecutor(_PULLS_AT_ONCE) as pool:
            pulled = list(pool.map(lambda name: self._shared.pull(name, self.folder / name), missing))
        self._refused |= {name for name, sound in zip(missing, pulled, strict=True) if not sound}
        return any(pulled)

    def _read_new(self) -> None:
        """Enter into the index the digests of parts that are not in it; a damaged part is removed."""
        heads, places = [self._heads], [self._places]
        for path in sorted(self.folder.glob(f"*{_SUFFIX}")):
            if path.name in self._seen:
                continue
            with suppress(FileNotFoundError):  # another process found it damaged
                if is_sound(path, path.name):
                    keys = load_file(path)["digests"]
                    heads.append(_heads(keys))
                    places.append(np.stack([np.full(len(keys), len(self._parts)), np.arange(len(keys))], axis=1))
                    self._parts.append(path)
                    self._seen.add(path.name)
                else:
                    log.warning("part of the vector cache is damaged, not used", path=str(path))
                    path.unlink()
        if len(heads) > 1:
            joined = np.concatenate(heads)
            order = np.argsort(joined, kind="stable")
            self._heads, self._places = joined[order], np.concatenate(places)[order]

    def _look_up(self, wanted: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Vectors and found, as `get`, of digests uint8 [m, 32]."""
        vectors = np.zeros((len(wanted), self.dimension), dtype=np.float16)
        found = np.zeros(len(wanted), dtype=bool)
        if not len(self._heads):
            return vectors, found
        heads = _heads(wanted)
        places = np.minimum(np.searchsorted(self._heads, heads), len(self._heads) - 1)
        asked = np.flatnonzero(self._heads[places] == heads)
        parts, rows = self._places[places[asked]].T
        for number in np.unique(parts):
            here = parts == number
            with suppress(FileNotFoundError):  # somebody cleared the cache
                part = load_file(self._parts[number])
                found[asked[here]] = (part["digests"][rows[here]] == wanted[asked[here]]).all(axis=1)
                vectors[asked[here]] = part["vectors"][rows[here]]
        vectors[~found] = 0
        return vectors, found


def _heads(keys: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).ravel()
