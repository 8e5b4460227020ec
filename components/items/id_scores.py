"""What the ID vectors alone say of an item, beside what a trained model says (docs/model.md).

    score(user, j) = (Σ_p w_p h_p) · x_j,   w_p ∝ p^(-δ), of sum one;   p = 1 is the newest item of the history

h and x are an item's ID vectors in history and as a candidate (id_vectors.py).
"""

import torch

AGE_DECAY = 0.8  # δ
_EXAMPLES_AT_ONCE = 64  # whose items' vectors are in memory at once


def history_weights(known: torch.Tensor) -> torch.Tensor:
    """Weights w [B, L] of history places, newest first, of which `known` [B, L] hold an item; zero where none does."""
    places = torch.arange(1, known.shape[1] + 1, dtype=torch.float32, device=known.device)
    weights = known * places**-AGE_DECAY
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)


def score_items(users: torch.Tensor, candidates: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Inner products [E, K] of users [E, d] with some candidates [n, d] of each, named by their rows [E, K]."""
    scores = torch.empty(rows.shape)
    for start in range(0, len(rows), _EXAMPLES_AT_ONCE):
        part = slice(start, start + _EXAMPLES_AT_ONCE)
        scores[part] = torch.einsum("ekd,ed->ek", candidates[rows[part]], users[part])
    return scores
