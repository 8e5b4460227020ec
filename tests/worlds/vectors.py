from pathlib import Path

import numpy as np
import numpy.typing as npt

from components.urm.data.request import Floats
from components.urm.inference import UrmRecaller
from components.urm.retrieval.users import UserVectors


def without_own(vectors: Floats) -> UserVectors:
    """User vectors of requests without a history."""
    nothing = [np.empty(0, dtype=np.int64)] * len(vectors), [np.empty(0, dtype=np.float32)] * len(vectors)
    return UserVectors(vectors, *nothing)


def write_candidates(folder: Path, recaller: UrmRecaller, item_ids: npt.NDArray[np.int64]) -> None:
    """Write the vectors of all candidates as `sft` does."""
    folder.mkdir()
    np.save(folder / "keys.npy", item_ids)
    np.save(folder / "vectors.npy", recaller.encode_items(item_ids))
