"""Codes: fixed pseudo-random vectors of words and attribute values, computed from a hash, never trained.

Codes of different words or values have an inner product near zero (standard deviation 1/√width), so a sum of codes
identifies its parts: "these words", "this brand". Content vectors of similar things cannot do that. The codes are a
random projection of one-hot vectors (Achlioptas 2003).

    lexical vector of text   Σ_w idf_w · √tf_w · code_w, of length one;  a query: Σ_w code_w / √n of its n words
    guidance                 as a query, of words that occur in the texts and are no stop words
    attribute vector         the code of the attribute's value, e.g. of a brand
"""

import hashlib
import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer, TfidfTransformer

from components.items.hashing import GAMMA, mix_bits
from components.items.words import IDEOGRAPHS, MARKS, cut_runs, normalise

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]  # as an item table stores vectors
Words = npt.NDArray[np.uint64]  # hashes of words, sorted

_BITS = 64
_WORD = re.compile(rf"\w[\w{MARKS}]+|[{IDEOGRAPHS}]")
# These words of the library's list describe products.
STOP_WORDS = ENGLISH_STOP_WORDS - {"bottom", "fire", "front", "full", "thick", "thin", "top"}


def codes_of(numbers: npt.NDArray[np.int64], width: int, part: slice = slice(None)) -> Floats:
    """Codes of numbers, of shape [n, width] with entries ±1/√width; `width` is a multiple of 64, zero allowed.

    `part` chooses some of the blocks of 64 columns.
    """
    words = np.arange(1, width // _BITS + 1, dtype=np.uint64)[part]
    state = numbers.astype(np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03) + words * GAMMA
    codes = np.unpackbits(mix_bits(state).view(np.uint8).reshape(len(numbers), -1), axis=1).astype(np.float32)
    codes *= 2
    codes -= 1
    codes /= np.float32(np.sqrt(max(width, 1)))
    return codes


def lexical_vectors(texts: Sequence[str], width: int) -> tuple[Halves, npt.NDArray[np.bool_]]:
    """Vectors [n, width] of texts, weighted by the words' rarity among them, and whether each text has a word [n]."""
    counter = CountVectorizer(analyzer=_words)
    present = np.array([bool(_words(text)) for text in texts])
    vectors = np.zeros((len(texts), width), dtype=np.float16)
    if present.any():
        weights = TfidfTransformer().fit_transform(counter.fit_transform(texts).sqrt())
        hashes = _hashes(counter.get_feature_names_out()).astype(np.int64)
        for block in range(width // _BITS):  # all at once are gigabytes: there may be as many words as texts
            codes = codes_of(hashes, width, slice(block, block + 1))
            vectors[:, block * _BITS : (block + 1) * _BITS] = (weights @ codes).astype(np.float32)
    return vectors, present


def query_vector(text: str, width: int) -> Floats:
    """Vector [width] whose inner product with a lexical vector grows with the number of query words in the text."""
    words = sorted(set(_words(text)))
    if not words or not width:
        return np.zeros(width, dtype=np.float32)
    total: Floats = _codes_of(words, width).sum(axis=0) / np.float32(math.sqrt(len(words)))
    return total


def list_words(texts: Sequence[str]) -> Words:
    """The distinct words of texts, as sorted hashes."""
    return np.unique(_hashes(sorted({word for text in texts for word in _words(text)})))


def name_hashes(names: Sequence[str]) -> Words:
    """A hash of each name [n]; equal for names of the same words in the same order, 0 for one without words."""
    words = [" ".join(_words(name)) for name in names]
    hashes = _hashes(words)
    hashes[[not of_name for of_name in words]] = 0
    return hashes


def guidance_vectors(text: str, known: Sequence[Words], widths: Sequence[int]) -> list[Floats]:
    """Vectors of a free text in word spaces, one per set of texts that a space is built from.

    Words have equal weights, as in a query, but stop words and words that occur in no text are left out as noise. Each
    space has the words that occur in its own texts (`known`, see `list_words`); n counts the words that occur in any of
    them, so that a single word known to the categories does not stand for the whole phrase.

    Returns:
        One vector [width] per space, Σ_w code_w / √n; zero without a known word.
    """
    words = sorted(set(_words(text)) - STOP_WORDS)
    hashes = _hashes(words)
    has = [_are_among(hashes, table) for table in known]
    num_words = sum(map(any, zip(*has, strict=True)))
    if not num_words:
        return [np.zeros(width, dtype=np.float32) for width in widths]
    shares = [mask.astype(np.float32) / np.float32(math.sqrt(num_words)) for mask in has]
    return [
        np.asarray(share @ _codes_of(words, width), dtype=np.float32)
        for share, width in zip(shares, widths, strict=True)
    ]


def unknown_share(text: str, known: Words) -> float:
    """Share of the words of a query, without stop words, that are not among known ones (see `list_words`); 0 to 1."""
    words = sorted(set(_words(text)))
    said = sorted(set(words) - STOP_WORDS) or words
    return 1.0 - float(_are_among(_hashes(said), known).mean()) if said else 1.0


def attribute_vectors(values: Sequence[str | None], width: int) -> tuple[Halves, npt.NDArray[np.bool_]]:
    """Code of each value [n, width], and where there is a value [n]."""
    present = np.array([bool(value) for value in values])
    numbers: dict[str, int] = {}
    places = [numbers.setdefault(value or "", len(numbers)) for value in values]
    codes = _codes_of(list(numbers), width).astype(np.float16)[places]
    codes[~present] = 0
    return codes, present


def _are_among(hashes: Words, known: Words) -> npt.NDArray[np.bool_]:
    """Which hashes are among sorted ones; `np.isin` would sort those, all words of a catalogue, for each query."""
    places = np.searchsorted(known, hashes)
    inside = places < len(known)
    inside[inside] = known[places[inside]] == hashes[inside]
    return inside


def _words(text: str) -> list[str]:
    return cut_runs(_WORD.findall(normalise(text)))


def _codes_of(names: Sequence[str], width: int) -> Floats:
    return codes_of(_hashes(names).astype(np.int64), width)


def _hashes(names: Sequence[str]) -> npt.NDArray[np.uint64]:
    numbers = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in names]
    return np.array(numbers, dtype=np.uint64)
