"""The output of target attention's scoring MLP, a slice of the examples at a time.

For example e of context b and candidate c the score is w_e · relu(z_bc + u_e). Plain operations hold [E, C, h] numbers
several times over, forwards and backwards, and wait for memory. Here a slice of them fits in a core's cache; what the
gradient needs of it is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

SLICE_SIZE = 1 << 17  # numbers of one slice: half a megabyte


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, users: Tensor, weights: Tensor, contexts: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, users, weights, contexts)
        scores = hidden.new_empty(len(contexts), hidden.shape[1])
        for rows in _slices(hidden, contexts):
            active = _active(hidden, users[rows], contexts[rows])
            torch.bmm(active, weights[rows].unsqueeze(2), out=scores[rows].unsqueeze(2))
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, users, weights, contexts = ctx.saved_tensors
        to_hidden, to_users, to_weights = (torch.zeros_like(part) for part in (hidden, users, weights))
        for rows in _slices(hidden, contexts):
            active, given = _active(hidden, users[rows], contexts[rows]), gradient[rows].unsqueeze(1)  # [e, 1, C]
            to_weights[rows] = torch.bmm(given, active).squeeze(1)
            reached = active.sign()
            to_users[rows] = torch.bmm(given, reached).squeeze(1) * weights[rows]
            reached.mul_(weights[rows].unsqueeze(1)).mul_(given.transpose(1, 2))
            to_hidden.index_add_(0, contexts[rows], reached)
        return to_hidden, to_users, to_weights, None


def activate(hidden: Tensor, users: Tensor, weights: Tensor, contexts: Tensor) -> Tensor:
    """Sum over h of weights · relu(hidden of the example's context + users).

    Args:
        hidden: [B, C, h].
        users: [E, h].
        weights: [E, h].
        contexts: Rows of `hidden`, [E].

    Returns:
        [E, C], differentiable once in the first three.
    """
    scores: Tensor = _Activation.apply(hidden, users, weights, contexts)  # type: ignore[no-untyped-call]  # torch's own
    return scores


def _active(hidden: Tensor, users: Tensor, contexts: Tensor) -> Tensor:
    return hidden.index_select(0, contexts).add_(users.unsqueeze(1)).relu_()


def _slices(hidden: Tensor, contexts: Tensor) -> Iterator[slice]:
    size = max(1, SLICE_SIZE // (hidden.shape[1] * hidden.shape[2]))
    for start in range(0, len(contexts), size):
        yield slice(start, start + size)
