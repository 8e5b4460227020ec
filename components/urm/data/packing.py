"""Packing: one sequence per context, its prefix followed by all of its task blocks.

    B contexts (sequences) · S tokens · E blocks (one per example) · H user tokens · L history items · M text labels ·
    T tokens of a block's task text

A token attends to earlier tokens of the prefix and of its own block. Positions restart after the prefix in every
block, so that a block sees exactly what it would see alone: packed and separate passes give equal vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from components.urm.data.batch import PackedPrompts
from components.urm.data.prompt import Block, Prefix, Writer

PREFIX, PADDING = 0, -1  # segments; block k of a sequence has segment k + 1


@dataclass(frozen=True)
class PromptParts:
    """Content of one sequence."""

    prefix: Prefix  # text and item tokens
    blocks: Sequence[Block]  # tasks of the context


def pack(parts: Sequence[PromptParts], writer: Writer) -> PackedPrompts:
    """Lay out the sequences, padded at the end to the longest."""
    rows = [_Row(part, writer) for part in parts]
    length = max(len(row.token_ids) for row in rows)
    starts = [index * length for index in range(len(rows))]
    items = [(index, place, column) for index, part in enumerate(parts) for place, column in part.prefix.items]
    return PackedPrompts(
        token_ids=_pad([row.token_ids for row in rows], length, writer.end_id),
        positions=_pad([row.positions for row in rows], length, 0),
        segments=_pad([row.segments for row in rows], length, PADDING),
        item_positions=torch.tensor(
            [[sequence for sequence, _, _ in items], [place for _, place, _ in items]], dtype=torch.long
        ).reshape(2, -1),
        item_columns=_long([column for _, _, column in items]),
        user_positions=_long(
            [[start + p for p in user] for start, row in zip(starts, rows, strict=True) for user in row.user]
        ),
        task_positions=_pad_positions(
            [
                range(start + first, start + end)
                for start, row in zip(starts, rows, strict=True)
                for first, end in row.task
            ]
        ),
        lm_positions=_long([start + p for start, row in zip(starts, rows, strict=True) for p in row.predicting]),
        labels=_long([label for row in rows for label in row.labels]),
        block_rows=_long([index for index, row in enumerate(rows) for _ in row.user]),
    )


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Which token may attend to which: earlier ones of the prefix and of its own block, by segments [B, S].

    Returns:
        bool [B, 1, S, S], true where the row attends to the column; every token attends to itself.
    """
    own = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool, device=segments.device).tril()
    return ((own | (segments == PREFIX)[:, None, :]) & causal)[:, None]


class _Row:
    """One sequence under construction."""

    def __init__(self, part: PromptParts, writer: Writer) -> None:
        self.token_ids = [*part.prefix.token_ids]
        prefix = len(self.token_ids)
        self.positions = list(range(prefix))
        self.segments = [PREFIX] * prefix
        self.user: list[list[int]] = []
        self.task: list[tuple[int, int]] = []
        self.predicting: list[int] = []
        self.labels: list[int] = []
        for number, block in enumerate(part.blocks):
            self._add(number + 1, prefix, block, writer)

    def _add(self, segment: int, prefix: int, block: Block, writer: Writer) -> None:
        start = len(self.token_ids)
        first_user = start + len(block.prompt)
        lm = first_user + len(writer.user_ids)
        # The end token is predicted, never read.
        self.token_ids += [*block.prompt, *writer.user_ids, writer.lm_id, *block.text[:-1]]
        size = len(self.token_ids) - start
        self.positions += range(prefix, prefix + size)
        self.segments += [segment] * size
        self.task.append((start, first_user))
        self.user.append(list(range(first_user, lm)))
        self.predicting += range(lm, lm + len(block.text))
        self.labels += block.text


def _pad(rows: Sequence[Sequence[int]], length: int, value: int) -> torch.Tensor:
    table: npt.NDArray[np.int64] = np.full((len(rows), length), value, dtype=np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return torch.from_numpy(table)


def _pad_positions(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    return _pad(rows, max((1, *(len(row) for row in rows))), -1)


def _long(values: Sequence[object]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
