"""Top-K over the whole catalogue: what every kind of index answers, and how candidates are read and searched.

n requests · H user vectors each · N items · d width of a vector
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from components.exceptions import DataError, MissingInputError
from components.urm.data.request import Floats, Ids
from components.urm.retrieval.exact import ExactIndex
from components.urm.retrieval.faiss_kinds import load_index
from components.urm.retrieval.users import Combine, UserVectors


class CandidateIndex(Protocol):
    """Candidates by item id."""

    item_ids: Ids  # all ids, in the order of the index [N]

    @property
    def width(self) -> int:
        """D."""

    def vectors_of(self, item_ids: Ids) -> Floats:
        """Vectors [m, d] of some of the items, as exactly as the index keeps them."""

    def search(
        self, users: UserVectors, k: int, combine: Combine, exclude: Sequence[Ids] | None, blocked: Ids | None
    ) -> tuple[list[Ids], list[Floats]]:
        """Best items of each request; call `search` below, which checks the arguments first."""


def read_candidates(path: Path) -> CandidateIndex:
    """The index of a folder with keys.npy and vectors.npy, or of a file written by faiss.

    Raises:
        MissingInputError: There is neither.
        DataError: The file holds another kind of index.
    """
    if path.is_file():
        return load_index(path)
    try:
        keys = np.load(path / "keys.npy", allow_pickle=False)
        vectors = np.load(path / "vectors.npy", mmap_mode="c", allow_pickle=False)  # torch wants arrays it could write
    except FileNotFoundError as error:
        raise MissingInputError(
            f"candidates {path}",
            expected="keys.npy and vectors.npy, or a faiss index file",
            got=f"no {Path(error.filename).name}",
            remedy="run `urm sft` again",
        ) from None
    return ExactIndex(keys, vectors)


def search(
    index: CandidateIndex,
    users: UserVectors,
    k: int,
    combine: Combine,
    exclude: Sequence[Ids] | None = None,
    blocked: Ids | None = None,
) -> tuple[list[Ids], list[Floats]]:
    """Best items of each of n requests; exact with an exact index, and fewer than k where the catalogue is smaller.

    `exclude` has item ids that may not appear, one array per request, which is short: an approximate index searches
    deeper by its length. `blocked` has those that may not appear for any of them, however many.

    Returns:
        Item ids and scores of each request, best first; of equal scores the lower item id comes first.

    Raises:
        DataError: The vectors do not fit the index, or `exclude` does not fit the requests.
    """
    num_requests, _, width = users.vectors.shape
    excluded = num_requests if exclude is None else len(exclude)
    if width != index.width or excluded != num_requests:
        raise DataError(
            "search",
            expected=f"user vectors of width {index.width} and one exclusion per request",
            got=f"width {width}, {excluded} exclusions for {num_requests} requests",
            remedy="use the model and the candidates of one release",
        )
    if num_requests == 0 or k == 0 or not len(index.item_ids):
        nothing = [np.empty(0, dtype=np.int64)] * num_requests
        return nothing, [np.empty(0, dtype=np.float32)] * num_requests
    return index.search(users, k, combine, exclude, blocked)
