"""The bundle's index: of a kind that fits the catalogue's size, and measured against the exact one (ADR 16)."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import structlog

from components.config import RunConfig
from components.exceptions import ReleaseError
from components.release.bundle import IndexNote, SmokeRequest
from components.release.smoke import to_requests
from components.urm.data.request import Floats, Ids, RecallRequest
from components.urm.inference import UrmRecaller
from components.urm.retrieval.exact import ExactIndex
from components.urm.retrieval.exhaustive import recall_of, top_of_all
from components.urm.retrieval.faiss_kinds import BLOCK, KINDS, Kind, build_approximate, choose_kind, save_index
from components.urm.retrieval.index import read_candidates

log = structlog.get_logger()


def write_index(
    folder: Path,
    smoke: Sequence[SmokeRequest],
    load: Callable[[], UrmRecaller],
    config: RunConfig,
    target: Path,
    report: Callable[..., None],
) -> IndexNote:
    """Write the index of the candidates, whose keys and vectors are in the folder, to the file `target`.

    Under `release.index: auto` a kind that finds too little of the exact top-k gives way to the more exact one. An
    approximate index is measured on the smoke requests; only then `load` loads the model that answers them.

    Raises:
        ReleaseError: Keys and vectors do not fit, a vector is not finite, or a kind that the configuration names finds
            too little.
    """
    candidates = Candidates(folder)
    wanted, floor = config.release.index, config.release.index_min_recall
    first: Kind = choose_kind(len(candidates.keys)) if wanted == "auto" else wanted
    probe: Probe | None = None
    for kind in reversed(KINDS[: KINDS.index(first) + 1]):
        report(f"building the {kind} index")
        candidates.write(kind, config.seed, target)
        if kind == "exact":
            break
        probe = probe or Probe(load(), to_requests(smoke, config.tasks), candidates, config.recall.k)
        note = probe.measure(kind, target)
        if note.recall >= floor:
            return note
        if wanted != "auto":
            raise _too_little(note, floor)
        log.warning("index finds too little", kind=kind, recall=round(note.recall, 4), floor=floor)
    return IndexNote(kind="exact", items=len(candidates.keys))


class Candidates:
    """What sft left as `candidates`, memory-mapped."""

    def __init__(self, folder: Path) -> None:
        """Read and check them."""
        self.keys: Ids = np.load(folder / "keys.npy", allow_pickle=False)
        self.vectors: Floats = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        if self.vectors.ndim != 2 or len(self.keys) != len(self.vectors) or not len(self.keys):
            got = f"{len(self.keys)} keys and vectors of shape {self.vectors.shape}"
            raise refuse("candidates", "one vector per key", got)
        unsound = sum(int((~np.isfinite(block)).any(axis=1).sum()) for block in self.blocks())
        if unsound:
            raise refuse("candidates", "finite vectors", f"{unsound} that are not")

    def blocks(self) -> Iterator[Floats]:
        """The vectors, some at a time."""
        for start in range(0, len(self.keys), BLOCK):
            yield self.vectors[start : start + BLOCK]

    def write(self, kind: Kind, seed: int, target: Path) -> None:
        """Write an index of them."""
        if kind == "exact":
            save_index(ExactIndex(self.keys, self.vectors), target)
        else:
            save_index(build_approximate(kind, self.keys, self.blocks, seed, target.parent), target)


class Probe:
    """The smoke requests with their exact answers."""

    def __init__(
        self, recaller: UrmRecaller, requests: Sequence[RecallRequest], candidates: Candidates, k: int
    ) -> None:
        """Ask the model for the user vectors, and the whole catalogue for the k best answers."""
        self.recaller, self.k, self.num_items = recaller, k, len(candidates.keys)
        self.users = recaller.encode_users(requests)
        self.exclude = [request.excluded_items for request in requests]
        self.exact = top_of_all(candidates.keys, candidates.blocks(), self.users, k, recaller.combine, self.exclude)

    def measure(self, kind: Kind, path: Path) -> IndexNote:
        """How much of the exact answers an index file finds."""
        self.recaller.index = read_candidates(path)
        found, _ = self.recaller.top_k(self.users, self.k, self.exclude)
        self.recaller.index = None
        recall = recall_of(found, self.exact)
        return IndexNote(kind=kind, items=self.num_items, recall=recall, requests=len(found), k=self.k)


def _too_little(note: IndexNote, floor: float) -> ReleaseError:
    return ReleaseError(
        f"index of kind {note.kind!r}",
        expected=f"at least {floor:g} of the exact top-{note.k} (release.index_min_recall)",
        got=f"{note.recall:.4f} over {note.requests} smoke requests",
        remedy="set release.index to auto or to a more exact kind",
    )


def refuse(subject: str, expected: str, got: object) -> ReleaseError:
    """The error of inputs that do not fit."""
    return ReleaseError(subject, expected=expected, got=got, remedy="run the stages before `release` again")
