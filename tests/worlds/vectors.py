from __future__ import annotations

import numpy as np

from components.urm.data.request import Floats
from components.urm.retrieval.users import UserVectors


def without_own(vectors: Floats) -> UserVectors:
    """User vectors of requests without a history."""
    nothing = [np.empty(0, dtype=np.int64)] * len(vectors), [np.empty(0, dtype=np.float32)] * len(vectors)
    return UserVectors(vectors, *nothing)
