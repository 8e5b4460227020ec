"""h_UM: hidden states of the [UM] tokens become H user vectors, and how H inner products become one score.

    E examples · H user vectors · D hidden width · B contexts · L history items · N candidates
    an item's vector     v = [ item space p (P) ; identity code c (C) ; log frequency (1) ]
    a user vector        u = [ W h + a·Σᵢ wᵢ pᵢ ; g·Σᵢ zᵢ cᵢ, i of its stripe ; popularity weight ]
    score(user, item)    combine over H of  u_h · v

Departure from the paper, which has W h alone (ADR 4): the sums copy from the history. With m the match of the user
token and history item i, zᵢ = softplus(mᵢ) says how much that very item is wanted, and w = softmax(m) moves the user
vector towards such items. The H vectors share the exact copies out among them, every H-th place of the history
each (a stripe): a sum of n codes blurs each by √(n / C), so H vectors remember H times as many items.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

Combine = Literal["max", "logsumexp", "mean"]


class UserHead(nn.Module):
    """User vectors from hidden states, with the copy path."""

    def __init__(self, hidden_width: int, item_width: int, pointer_width: int) -> None:
        """Start as a model of popularity and of the user's habits."""
        super().__init__()
        self.norm = nn.LayerNorm(hidden_width)
        self.project = nn.Linear(hidden_width, item_width)
        self.query = nn.Linear(hidden_width, pointer_width)
        self.key_norm = nn.LayerNorm(hidden_width)
        self.key_hidden = nn.Linear(hidden_width, pointer_width)
        self.key = nn.Linear(pointer_width, pointer_width + 1)  # the last column: wanted by any user token alike
        self.gains = nn.Linear(hidden_width, 3)  # similar items, these very items, popularity
        self.log_scale = nn.Parameter(torch.tensor(math.log(5.0)))
        nn.init.normal_(self.project.weight, std=0.05)
        nn.init.zeros_(self.project.bias)
        nn.init.normal_(self.query.weight, std=0.5)
        nn.init.normal_(self.key.weight, std=0.5)
        nn.init.zeros_(self.key.bias)
        nn.init.zeros_(self.gains.weight)
        with torch.no_grad():
            self.gains.bias.copy_(torch.tensor([1.0, 5.0, 1.0]))

    def forward(
        self,
        hidden: torch.Tensor,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        habit: torch.Tensor,
        items: torch.Tensor,
        codes: torch.Tensor,
        known: torch.Tensor,
    ) -> torch.Tensor:
        """User vectors [E, H, P + C + 1].

        Args:
            hidden: Hidden states of the user tokens [E, H, D].
            rows: Context of each example [E].
            tokens: History item tokens [B, L, D].
            habit: How much of a habit each of them is, a prior of the match [B, L].
            items: Their item-space vectors [B, L, P].
            codes: Their identity codes [B, L, C].
            known: Which history places hold an item [B, L].
        """
        # Inputs of length one: a step of Adam then moves an output by hundredths, whatever the width.
        unit = self.norm(hidden.float()) / math.sqrt(hidden.shape[-1])
        keys, own = self._keys(tokens.float())
        match = torch.einsum("ehk,elk->ehl", self.query(unit), keys[rows]) / math.sqrt(keys.shape[-1])
        match = match + (own + habit)[rows, None]
        masked = match.masked_fill(~known[rows, None], -1e4)  # an empty history then gives zeros through its items
        similar, exact, popular = self.gains(unit).unbind(dim=-1)
        attention = torch.softmax(masked, dim=-1)
        direction = self.project(unit) + similar[..., None] * torch.einsum("ehl,elp->ehp", attention, items[rows])
        wanted = functional.softplus(masked) * self._stripes(hidden.shape[1], masked.shape[2], hidden.device)
        copied = exact[..., None] * torch.einsum("ehl,elc->ehc", wanted, codes[rows])
        return torch.cat([self.log_scale.exp() * direction, copied, popular[..., None]], dim=-1)

    def _keys(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [B, L, K] and own weights [B, L] of history items."""
        hidden = functional.gelu(self.key_hidden(self.key_norm(tokens)))
        keys = self.key(hidden / math.sqrt(hidden.shape[-1]))
        return keys[..., :-1], keys[..., -1]

    @staticmethod
    def _stripes(num_vectors: int, num_items: int, device: torch.device) -> torch.Tensor:
        """Which user vector may copy which history place [H, L]: every H-th place from the newest on."""
        place = torch.arange(num_items, device=device) % num_vectors
        return place == torch.arange(num_vectors, device=device)[:, None]


def combine_scores(scores: torch.Tensor, how: Combine) -> torch.Tensor:
    """One score [...] of H inner products [..., H].

    `logsumexp` is reduced by log H, so that H equal products give that product under all three.
    """
    if how == "max":
        return scores.amax(dim=-1)
    if how == "mean":
        return scores.mean(dim=-1)
    return torch.logsumexp(scores, dim=-1) - math.log(scores.shape[-1])
