"""Inference: requests in, user vectors and recalled items out. Training, evaluation and recall use it.

    recaller = UrmRecaller.load(model_dir, item_table_dir, candidates)   # folder of sft's `candidates`, or index.faiss
    users = recaller.encode_users(requests)                             # UserVectors
    item_ids, scores = recaller.top_k(users, k, exclude=[...])           # lists of arrays, best first
    item_ids, scores = recaller.recall(requests, k)                     # both, and exclude_bought of the tasks
    text = recaller.generate_text(request, max_tokens=32)

Requests that share one `UserContext` object share one pass over their prefix. A recaller is read-only after `load` and
may be used by several threads, except that its token counter is then inexact.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from components.device import to_device
from components.exceptions import MissingInputError
from components.items.table import ItemTable
from components.urm.data.batch import Batch
from components.urm.data.batches import BatchBuilder, ItemReader
from components.urm.data.meaning import QueryMeaning
from components.urm.data.packing import PADDING
from components.urm.data.prompt import Block, PromptWriter
from components.urm.data.request import Floats, Ids, RecallRequest, UserContext
from components.urm.network.build import NewModel
from components.urm.network.files import TEXT_ENCODER, load_model
from components.urm.network.model import Urm, UrmOutput
from components.urm.retrieval.index import CandidateIndex, read_candidates, search
from components.urm.retrieval.users import Combine, UserVectors

CONTEXTS_PER_PASS = 8  # of some 400 tokens each: enough to use all cores of a CPU
ITEMS_PER_PASS = 4096


class UrmRecaller:
    """A loaded model with its item table and, for top-K, its candidates."""

    def __init__(
        self, model: Urm, builder: BatchBuilder, combine: Combine, index: CandidateIndex | None = None
    ) -> None:
        """Wrap a model in memory; `load` reads one from files."""
        self.model = model
        self.builder = builder
        self.combine = combine
        self.index = index
        self.num_tokens = 0  # encoded into user vectors so far, without padding

    @classmethod
    def load(
        cls,
        model_dir: str | Path,
        item_table_dir: str | Path,
        candidates: str | Path | None = None,
        device: str = "cpu",
    ) -> UrmRecaller:
        """Read a model, map its item table, and read its candidates: outputs of stage sft.

        `candidates` may also be an index file; None if only vectors are needed.

        Raises:
            MissingInputError: A file is missing.
            DataError: The files do not belong together.
        """
        model, writer, description = load_model(Path(model_dir))
        reader = ItemReader(ItemTable.open(item_table_dir), tuple(description.widths))
        reader.check(description.widths, description.num_counts)
        meaning = (
            QueryMeaning(Path(model_dir) / TEXT_ENCODER, reader.table, reader.modalities)
            if description.meaning
            else None
        )
        builder = BatchBuilder(writer, reader, description.behaviors, description.config.copy_length, meaning)
        index = read_candidates(Path(candidates)) if candidates is not None else None
        return cls(model.to(device).eval(), builder, description.config.combine, index)

    @property
    def num_user_vectors(self) -> int:
        """H, vectors per request."""
        return len(self.builder.writer.user_ids)

    @property
    def dimension(self) -> int:
        """Width of user and candidate vectors."""
        return self.model.dimension

    @property
    def num_candidates(self) -> int:
        """Items that can be recalled."""
        return len(self._index().item_ids)

    @property
    def candidate_ids(self) -> Ids:
        """Items that can be recalled, in the order of the index."""
        return self._index().item_ids.copy()  # the index may hold a view of its file

    def encode_users(self, requests: Sequence[RecallRequest]) -> UserVectors:
        """User vectors in the order of the requests."""
        groups: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(id(request.context), []).append(number)
        # Group histories of similar length, so that padding is short.
        ordered = sorted(groups.values(), key=lambda numbers: len(requests[numbers[0]].context.item_ids))
        vectors = np.empty((len(requests), self.num_user_vectors, self.dimension), dtype=np.float32)
        copy_items: list[Ids] = [np.empty(0, dtype=np.int64)] * len(requests)
        copy_scores: list[Floats] = [np.empty(0, dtype=np.float32)] * len(requests)
        for start in range(0, len(ordered), CONTEXTS_PER_PASS):
            chunk = ordered[start : start + CONTEXTS_PER_PASS]
            flat = [number for numbers in chunk for number in numbers]
            vectors[flat], scores = self._encode([[requests[n] for n in numbers] for numbers in chunk])
            known = [self.builder.known_items(requests[numbers[0]].context) for numbers in chunk for _ in numbers]
            for number, items, copies in zip(flat, known, scores, strict=True):
                copy_items[number], copy_scores[number] = items, copies
        return UserVectors(vectors, copy_items, copy_scores)

    def top_k(
        self, users: UserVectors, k: int, exclude: Sequence[Ids] | None = None, blocked: Ids | None = None
    ) -> tuple[list[Ids], list[Floats]]:
        """Best items of each request, see `search`."""
        return search(self._index(), users, k, self.combine, exclude, blocked)

    def recall(self, requests: Sequence[RecallRequest], k: int) -> tuple[list[Ids], list[Floats]]:
        """Best items of each request; tasks with `exclude_bought` exclude the user's history."""
        exclude = [request.excluded_items for request in requests]
        return self.top_k(self.encode_users(requests), k, exclude)

    def encode_items(self, item_ids: Ids) -> Floats:
        """Candidate vectors, float32 [n, d]."""
        vectors = np.empty((len(item_ids), self.dimension), dtype=np.float32)  # once: of a large shop it is 10 GB
        with torch.inference_mode():
            for start in range(0, len(item_ids), ITEMS_PER_PASS):
                part = slice(start, start + ITEMS_PER_PASS)
                items = to_device(self.builder.reader.read(item_ids[part]), self._device)
                vectors[part] = self.model.item_vectors(items).cpu().numpy()
        return vectors

    def generate_text(self, request: RecallRequest, max_tokens: int = 32) -> str:
        """Text after [LM] by greedy decoding: the likely interests of the user in words.

        Raises:
            ConfigError: The model has no language model.
        """
        backbone, writer = self.model.language_model, self.builder.writer
        if not isinstance(writer, PromptWriter):
            raise TypeError(f"expected prompts of text for {type(backbone).__name__}, got {type(writer).__name__}")
        prompt = self._block(request)
        generated: list[int] = []
        with torch.inference_mode():
            for _ in range(max_tokens):
                logits = self.model(self._batch([(request.context, [prompt.continued(generated)])])).text_logits
                token = int(logits[-1].argmax())
                if token == writer.end_id:
                    break
                generated.append(token)
        return writer.decode(generated)

    def _encode(self, groups: Sequence[Sequence[RecallRequest]]) -> tuple[Floats, list[Floats]]:
        """Vectors of all requests, and copy scores of the known history items of each."""
        prompts = [(group[0].context, [self._block(request) for request in group]) for group in groups]
        batch = self._batch(prompts)
        self.num_tokens += int((batch["segments"] != PADDING).sum())
        with torch.inference_mode():
            output: UrmOutput = self.model(batch)
        lengths = batch["history_known"].sum(dim=1)[batch["block_rows"]].tolist()
        scores = np.asarray(output.copy_scores.cpu())
        known = [row[:length] for row, length in zip(scores, lengths, strict=True)]
        return np.asarray(output.user_vectors.cpu()), known

    def _block(self, request: RecallRequest) -> Block:
        return self.builder.writer.block(request.task, request.query, guidance=request.guidance)

    def _batch(self, prompts: Sequence[tuple[UserContext, Sequence[Block]]]) -> Batch:
        return to_device(self.builder.build(prompts)[0], self._device)

    @property
    def _device(self) -> torch.device:
        return self.model.user_head.log_scale.device

    def _index(self) -> CandidateIndex:
        if self.index is None:
            raise MissingInputError(
                "recall", expected="candidates", got="none", remedy="pass `candidates` to UrmRecaller.load"
            )
        return self.index


def write_candidates(folder: Path, new: NewModel, catalogue: pa.Table) -> int:
    """Write keys.npy and vectors.npy of all items of the catalogue; returns their number."""
    folder.mkdir()
    item_ids = catalogue["item_id"].to_numpy()
    recaller = UrmRecaller(new.model, new.builder, new.description.config.combine)
    np.save(folder / "keys.npy", item_ids)
    shape = (len(item_ids), recaller.dimension)
    with (folder / "vectors.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for start in range(0, len(item_ids), ITEMS_PER_PASS):  # of a large catalogue they do not fit in memory
            file.write(recaller.encode_items(item_ids[start : start + ITEMS_PER_PASS]).astype("<f4").tobytes())
    return len(item_ids)
