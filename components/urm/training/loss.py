"""Losses: sampled NCE over set targets with log-Q correction, and the likelihood of the target text.

    E examples · H user vectors · T targets · N negatives · d width of user and candidate vectors
    s(e,t) = combine over h of u_h · v_t, plus the copy score of t in e (zero unless t is in the history)

For a target t of example e, with negatives n drawn with replacement at probability q_n (sampled softmax of
Bengio and Senécal 2008; an item drawn N times with probability q is expected N·q times):

    loss(e, t) = -log  exp s(e,t) / ( exp s(e,t) + Σ_n exp( s(e,n) - log(N q_n) ) )

Drawn items that are targets of the example are left out of its sum. Every target is scored by the combination of
the H vectors, so that under `max` each trains its best vector: sequence in, set out.
"""

import torch
from torch.nn import functional as F

from components.urm.data.batch import TrainingBatch
from components.urm.network.heads import spread_copy_scores
from components.urm.network.model import UrmOutput
from components.urm.retrieval.users import Combine, combine_scores


def recall_loss(output: UrmOutput, batch: TrainingBatch, combine: Combine) -> torch.Tensor:
    """The sampled NCE of a batch."""
    places = batch["history_items"][batch["block_rows"]]
    copies = spread_copy_scores(output.copy_scores, places, len(output.item_vectors))  # [E, U]
    return sampled_nce(
        output.user_vectors,
        output.item_vectors[batch["targets"]],
        batch["target_mask"],
        output.item_vectors[batch["negatives"]],
        batch["log_expected"],
        batch["accidental"],
        copies.gather(1, batch["targets"]),
        copies[:, batch["negatives"]],
        combine,
    )


def sampled_nce(
    user_vectors: torch.Tensor,
    target_vectors: torch.Tensor,
    target_mask: torch.Tensor,
    negative_vectors: torch.Tensor,
    log_expected: torch.Tensor,
    accidental: torch.Tensor,
    target_copies: torch.Tensor,
    negative_copies: torch.Tensor,
    combine: Combine,
) -> torch.Tensor:
    """Mean over examples of the mean over their targets.

    Args:
        user_vectors: [E, H, d].
        target_vectors: [E, T, d].
        target_mask: False for padding [E, T]; at least one per example.
        negative_vectors: Shared by all examples [N, d].
        log_expected: log(N q_n) of each negative [N].
        accidental: Negatives that are targets of the example [E, N].
        target_copies: Copy score of each target, zero if it is not in the example's history [E, T].
        negative_copies: The same of each negative [E, N].
        combine: How H inner products become one score.
    """
    targets = (
        combine_scores(torch.einsum("ehd,etd->eth", user_vectors, target_vectors).float(), combine) + target_copies
    )
    products = torch.einsum("ehd,nd->enh", user_vectors, negative_vectors).float()
    negatives = combine_scores(products, combine) + negative_copies - log_expected
    rest = torch.logsumexp(negatives.masked_fill(accidental, float("-inf")), dim=-1, keepdim=True)  # [E, 1]
    losses = F.softplus(rest - targets)  # -log of the ratio above
    per_example = (losses * target_mask).sum(dim=-1) / target_mask.sum(dim=-1)
    return per_example.mean()


def text_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood per token, for logits [M, V] and labels [M]; zero where there is no text."""
    if labels.numel() == 0:
        return logits.sum() * 0.0
    return F.cross_entropy(logits.float(), labels)
