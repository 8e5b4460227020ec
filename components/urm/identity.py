"""Identity codes: a fixed pseudo-random unit vector for every item id, computed, never stored.

Two different ids have an inner product near zero (standard deviation 1/√width), so a sum of codes can say "one of
these very items", which the frozen content vectors of similar items cannot. See ADR 4.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_BITS = 64


def identity_codes(item_ids: npt.NDArray[np.int64], width: int) -> npt.NDArray[np.float32]:
    """Codes of shape [n, width] with entries ±1/√width; `width` is a multiple of 64, zero allowed."""
    words = np.arange(1, width // _BITS + 1, dtype=np.uint64)
    state = item_ids.astype(np.uint64)[:, None] * np.uint64(0xD1B54A32D192ED03) + words * np.uint64(0x9E3779B97F4A7C15)
    bits = np.unpackbits(_splitmix(state).view(np.uint8).reshape(len(item_ids), -1), axis=1)
    return (bits.astype(np.float32) * 2 - 1) / np.float32(np.sqrt(max(width, 1)))


def _splitmix(state: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The output function of splitmix64 (Steele, Lea, Flood 2014): every bit depends on every input bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
