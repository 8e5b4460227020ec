"""Fusion: the frozen vectors of an item become one token of the language model, and its vector in item space.

    U items · d_m width of modality m · F fusion width · D hidden width of the backbone
    P = Σ_m d_m, width of the frozen vectors side by side and of item space, unless `urm.item_dimension` sets d

    fused = norm(Σ_m MLP_m(x_m)),  an absent x_m gives a learned vector instead
    token = scale · norm(MLP(fused))                              [D]
    item  = [ x_1 ; x_2 ; … ] + MLP₀(fused) / √P,  MLP₀ zero at the start  [P]
    low rank: item = R [ x_1 ; x_2 ; … ] / √d + MLP₀(fused) / √d,  R drawn from N(0, 1)  [d]

Kinds (items/kinds.py) are part of item space alone: words, category and text say to the fused token what they say.

A modality may have different vectors for history items and candidates, the former under its name plus HISTORY_ROLE,
since "follows" is not symmetric. Item space then has two vectors per item, which differ in that modality.

The paper states the first two lines; in the third, the frozen vectors side by side are ours: similarity in item space
starts as their similarity instead of noise, and the user head can weight each modality separately. The low-rank form
has d dimensions for all, as published; R starts as a random projection, which keeps inner products in expectation.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from components.items.kinds import KINDS
from components.items.table import HISTORY_ROLE

COUNT_EDGES = (1.5, 2.5, 3.5, 5.5, 8.5, 12.5, 20.5, 40.5)
COUNT_MIDDLES = (1.0, 2.0, 3.0, 4.5, 7.0, 10.5, 16.5, 30.0, 60.0)
RECENCY_EDGES_DAYS = (1.0, 3.0, 7.0, 10.0, 14.0, 21.0, 30.0, 45.0, 60.0, 90.0, 120.0, 180.0, 365.0)
RECENCY_MIDDLES_DAYS = (0.5, 2.0, 5.0, 8.5, 12.0, 17.5, 25.5, 37.5, 52.5, 75.0, 105.0, 150.0, 272.0, 500.0)
HABIT_HALF_LIFE_DAYS = 365.0  # of the prior only; training moves every bucket's value


class ItemFusion(nn.Module):
    """Fuses any set of frozen modalities."""

    def __init__(
        self, widths: Mapping[str, int], *, fusion_width: int, token_width: int, item_dimension: int | None = None
    ) -> None:
        """Take the width of each modality by name, and d of a low-rank item space."""
        super().__init__()
        self.names = tuple(name for name in widths if name not in KINDS)
        self.space = item_space_widths(widths)
        self.encoders = nn.ModuleDict({name: _mlp(widths[name], fusion_width, fusion_width) for name in self.names})
        self.absent = nn.ParameterDict({name: nn.Parameter(torch.zeros(fusion_width)) for name in self.names})
        self.norm = nn.LayerNorm(fusion_width)
        self.to_token = _mlp(fusion_width, token_width, token_width)
        self.token_norm = nn.RMSNorm(token_width)
        frozen_width = sum(self.space.values())
        self.item_width = item_dimension or frozen_width
        self.reduce: nn.Linear | None = None  # R
        if item_dimension is not None:
            # Weights of about one, divided after the product: a step of Adam moves an item by a few per cent.
            self.reduce = nn.Linear(frozen_width, item_dimension, bias=False)
            nn.init.normal_(self.reduce.weight)
        self.to_item = _mlp(fusion_width, fusion_width, self.item_width)
        # Outputs are divided by √P, so that a step of Adam moves an item by a few per cent only.
        self.item_scale = 1 / math.sqrt(self.item_width)
        for parameter in self.to_item[-1].parameters():
            nn.init.zeros_(parameter)

    def match_scale(self, scale: float) -> None:
        """Give item tokens the root mean square of the vocabulary's embeddings."""
        nn.init.constant_(self.token_norm.weight, scale)

    def forward(self, vectors: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Fused representation [U, F] of vectors [U, d_m] and their presence flags [U]."""
        parts = [
            torch.where(present[name][:, None], self.encoders[name](vectors[name].float()), self.absent[name])
            for name in self.names
        ]
        fused: torch.Tensor = self.norm(torch.stack(parts).sum(dim=0))
        return fused

    def tokens(self, fused: torch.Tensor) -> torch.Tensor:
        """Token embeddings [U, D] of fused items [U, F]."""
        tokens: torch.Tensor = self.token_norm(self.to_token(fused))
        return tokens

    def items(
        self, fused: torch.Tensor, vectors: Mapping[str, torch.Tensor], present: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of fused items [U, F]: in item space as candidates, and side by side as items of a history [U, P].

        The latter are for `place`; in a low-rank item space they are the frozen vectors alone.
        """
        residual = self.to_item(fused.float()) * self.item_scale

        def frozen(names: Sequence[str]) -> torch.Tensor:
            return torch.cat([vectors[name].float() * present[name][:, None] for name in names], dim=-1)

        candidates = self.place(frozen(tuple(self.space))) + residual
        in_history = tuple(name + HISTORY_ROLE if name + HISTORY_ROLE in vectors else name for name in self.space)
        as_history = frozen(in_history)
        return candidates, as_history if self.reduce is not None else as_history + residual

    def place(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors side by side [..., P] in item space: as they are, or [..., d] of a low-rank one."""
        if self.reduce is None:
            return vectors
        placed: torch.Tensor = self.reduce(vectors) * self.item_scale
        return placed


def item_space_widths(widths: Mapping[str, int]) -> dict[str, int]:
    """Widths of the parts of item space by modality: those of candidate vectors."""
    return {name: width for name, width in widths.items() if not name.endswith(HISTORY_ROLE)}


class HistoryEmbedding(nn.Module):
    """Learned embeddings of the count, recency and behaviour of a user's interactions with an item."""

    def __init__(self, num_behaviors: int, width: int, scale: float) -> None:
        """Row 0 of the behaviours stands for unknown ones."""
        super().__init__()
        self.count = nn.Embedding(len(COUNT_EDGES) + 1, width)
        self.recency = nn.Embedding(len(RECENCY_EDGES_DAYS) + 1, width)
        self.behavior = nn.Embedding(num_behaviors + 1, width)
        for table in (self.count, self.recency, self.behavior):
            nn.init.normal_(table.weight, std=scale)
        recency = torch.tensor(RECENCY_MIDDLES_DAYS) * (-math.log(2) / HABIT_HALF_LIFE_DAYS)
        self.count_habit = nn.Parameter(torch.tensor(COUNT_MIDDLES).log())
        self.recency_habit = nn.Parameter(recency)

    def forward(self, counts: torch.Tensor, days_since: torch.Tensor, behaviors: torch.Tensor) -> torch.Tensor:
        """Sum of the three embeddings [B, L, D] for counts, days and behaviour numbers, each [B, L]."""
        count, recency = self._buckets(counts, days_since)
        embedding: torch.Tensor = self.count(count) + self.recency(recency) + self.behavior(behaviors)
        return embedding

    def habit(self, counts: torch.Tensor, days_since: torch.Tensor) -> torch.Tensor:
        """Habit score of each history item [B, L]; starts as log count, with a half-life of a year without the item."""
        count, recency = self._buckets(counts, days_since)
        return self.count_habit[count] + self.recency_habit[recency]

    @staticmethod
    def _buckets(counts: torch.Tensor, days_since: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = torch.bucketize(counts.float(), counts.new_tensor(COUNT_EDGES, dtype=torch.float32))
        return count, torch.bucketize(days_since.float(), days_since.new_tensor(RECENCY_EDGES_DAYS))


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))
