"""Batches: contexts and blocks of token ids, with the frozen vectors of exactly the items they need.

Frozen vectors of the distinct items of a batch are gathered from the memory-mapped item table. The model holds no copy
of the table, so its memory does not grow with the catalogue, and no gradient can reach them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from components.exceptions import ConfigError, DataError
from components.items.codes import guidance_vectors, name_hashes, query_vector, unknown_share
from components.items.kinds import KINDS
from components.items.table import HISTORY_ROLE, POPULARITY, ItemTable
from components.urm.data.batch import WORDS, Batch, History, ItemInputs
from components.urm.data.meaning import QueryMeaning
from components.urm.data.packing import PromptParts, pack
from components.urm.data.prompt import Block, Writer
from components.urm.data.request import Ids, UserContext

# Weight of guidance words relative to query words: a query names the category of every target, guidance only one of
# several interests. Its meaning counts as much as a query's, see docs/model.md.
GUIDANCE_STRENGTH = 0.5
_NO_WORDS = np.empty(0, dtype=np.uint64)


@dataclass(frozen=True)
class ItemReader:
    """Frozen inputs of items."""

    table: ItemTable
    modalities: tuple[str, ...]  # which of its modalities the model reads

    @property
    def widths(self) -> dict[str, int]:
        """Width of each modality by name."""
        return {name: self.table.modalities[name].vectors.shape[1] for name in self.modalities}

    @property
    def num_counts(self) -> int:
        """Number of popularity counts."""
        return int(self.table.modalities[POPULARITY].vectors.shape[1])

    def check(self, widths: Mapping[str, int], num_counts: int) -> None:
        """Check that the item table fits the model.

        Raises:
            DataError: A modality is missing or has another width.
        """
        found = {name: modality.vectors.shape[1] for name, modality in self.table.modalities.items()}
        wanted = dict(widths) | {POPULARITY: num_counts}
        if any(found.get(name) != width for name, width in wanted.items()):
            raise DataError(
                "item table",
                expected=f"modalities and widths {wanted}",
                got=found,
                remedy="use the model and the item table of one run",
            )

    def read_words(self, blocks: Sequence[Block], *, whole_guidance: bool = False) -> torch.Tensor:
        """Words of query and guidance of E blocks in the parts of item space made of words, concatenated [E, Q].

        With `whole_guidance` only a guidance of which the texts of each part have all words has any: a model that reads
        its meaning knows the others by that alone.
        """
        parts = [name for name in WORDS if name in self.widths]
        widths = [self.widths[name] for name in parts]
        known = [self.table.words.get(name, _NO_WORDS) for name in parts]
        vectors = np.zeros((len(blocks), sum(widths)), dtype=np.float32)
        for row, block in zip(vectors, blocks, strict=True):
            query = "" if block.words_withheld else block.query
            row[:] = np.concatenate([query_vector(query, width) for width in (*widths, 0)])
            if block.guidance and not (whole_guidance and any(unknown_share(block.guidance, words) for words in known)):
                row += GUIDANCE_STRENGTH * np.concatenate([*guidance_vectors(block.guidance, known, widths), []])
        return torch.from_numpy(vectors)

    def read_doubts(self, blocks: Sequence[Block]) -> torch.Tensor:
        """Share of the words of each query that each part of words lacks [E, len(WORDS)]; 1 where they are withheld.

        Zero without a query, and in a part whose words the item table does not list.
        """
        doubts = np.zeros((len(blocks), len(WORDS)), dtype=np.float32)
        for row, block in zip(doubts, blocks, strict=True):
            for place, name in enumerate(WORDS):
                if block.query and name in self.table.words:
                    known = self.table.words[name]
                    row[place] = 1.0 if block.words_withheld else unknown_share(block.query, known)
        return torch.from_numpy(doubts)

    def read_named(self, blocks: Sequence[Block]) -> torch.Tensor:
        """1 at the kinds that the query of each block names, by all its words in their order [E, widths of KINDS].

        Zero without a query and where its words are withheld, and at kinds whose names the item table does not list.
        """
        queries = name_hashes(["" if block.words_withheld else block.query for block in blocks])
        kinds = [name for name in KINDS if name in self.widths]
        names = [self.table.names.get(name, np.zeros(self.widths[name], np.uint64)) for name in kinds]
        columns = np.concatenate([*names, np.zeros(0, np.uint64)])
        named = (queries[:, None] == columns) & (columns != 0)
        return torch.from_numpy(named.astype(np.float32))

    def read(self, item_ids: Ids) -> ItemInputs:
        """Vectors, presence and popularity of items [U]."""
        gathered = {name: self.table.gather(name, item_ids) for name in self.modalities}
        popularity, _ = self.table.gather(POPULARITY, item_ids)
        return {
            "vectors": {name: torch.from_numpy(vectors) for name, (vectors, _) in gathered.items()},
            "present": {name: torch.from_numpy(present) for name, (_, present) in gathered.items()},
            "popularity": torch.from_numpy(popularity),
        }


def usable_modalities(table: ItemTable, wanted: Sequence[str]) -> tuple[str, ...]:
    """The wanted modalities that the table has, in both roles; some catalogues have no images, for example.

    Raises:
        ConfigError: It has none of them.
    """
    usable = tuple(
        name for modality in wanted for name in (modality, modality + HISTORY_ROLE) if name in table.modalities
    )
    if not set(usable) - set(KINDS):  # which say nothing to the token of an item
        others = [name for name in table.modalities if name not in (*KINDS, POPULARITY)]
        raise ConfigError(
            "field urm.modalities",
            expected=f"at least one of {', '.join(others)}",
            got=", ".join(wanted),
            remedy="name a modality of the item table",
        )
    return usable


class BatchBuilder:
    """Turns contexts with their blocks into the model's input."""

    def __init__(
        self,
        writer: Writer,
        reader: ItemReader,
        behaviors: Sequence[str],
        copy_length: int,
        meaning: QueryMeaning | None = None,
    ) -> None:
        """Take the behaviours in the training data, any other gets number 0; and what reads meanings."""
        self.writer = writer
        self.reader = reader
        self.copy_length = copy_length
        self.meaning = meaning
        self.behaviors = {name: number + 1 for number, name in enumerate(behaviors)}

    def build(
        self, groups: Sequence[tuple[UserContext, Sequence[Block]]], more_items: Ids | None = None
    ) -> tuple[Batch, npt.NDArray[np.int64]]:
        """One sequence per context with its blocks; `more_items` are added to those of the histories.

        Returns:
            The batch, and the place of each of `more_items` among its items.
        """
        kept = [self._known_places(context) for context, _ in groups]
        histories = [context.item_ids[places] for (context, _), places in zip(groups, kept, strict=True)]
        more = np.empty(0, dtype=np.int64) if more_items is None else more_items
        # Place 0 is always an item, even without history and candidates: padding points at it.
        everything = np.concatenate([np.zeros(1, dtype=np.int64), *histories, more])
        distinct, where = np.unique(everything, return_inverse=True)
        packed = pack(
            [
                PromptParts(self.writer.prefix(context, places), blocks)
                for (context, blocks), places in zip(groups, kept, strict=True)
            ],
            self.writer,
        )
        asked = [block for _, blocks in groups for block in blocks]
        meanings = np.zeros((len(asked), 0), np.float32)
        if self.meaning is not None:
            meanings = self.meaning.read([block.query for block in asked])
            meanings = meanings + self.meaning.read([block.guidance for block in asked])
        batch: Batch = {
            **packed,
            **self._history(groups, kept, where[1:]),
            "queries": self.reader.read_words(asked, whole_guidance=self.meaning is not None),
            "meanings": torch.from_numpy(meanings),
            "doubts": self.reader.read_doubts(asked),
            "named": self.reader.read_named(asked),
            "items": self.reader.read(distinct),
        }
        return batch, where[len(where) - len(more) :]

    def known_items(self, context: UserContext) -> Ids:
        """History items that the copy path reaches, newest first, in the order of a batch."""
        return context.item_ids[self._known_places(context)]

    def _known_places(self, context: UserContext) -> npt.NDArray[np.int64]:
        """Places of the newest history items that the item table has."""
        known = np.flatnonzero(self.reader.table.rows(context.item_ids) >= 0)
        return known[: self.copy_length]

    def _history(
        self,
        groups: Sequence[tuple[UserContext, Sequence[Block]]],
        kept: Sequence[npt.NDArray[np.int64]],
        where: npt.NDArray[np.int64],
    ) -> History:
        shape = (len(groups), max(1, *(len(places) for places in kept), 1))
        items, counts, behaviors = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        days, known = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
        start = 0
        for row, ((context, _), places) in enumerate(zip(groups, kept, strict=True)):
            size = len(places)
            items[row, :size] = where[start : start + size]
            counts[row, :size] = np.asarray(context.counts)[places]
            days[row, :size] = np.asarray(context.days_since)[places]
            behaviors[row, :size] = [self.behaviors.get(context.behaviors[place], 0) for place in places]
            known[row, :size] = True
            start += size
        return {
            "history_items": torch.from_numpy(items),
            "history_counts": torch.from_numpy(counts),
            "history_days_since": torch.from_numpy(days),
            "history_behaviors": torch.from_numpy(behaviors),
            "history_known": torch.from_numpy(known),
        }
