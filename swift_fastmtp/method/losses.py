"""Losses of the draft steps through the frozen, shared lm_head, a chunk of rows at a time.

The logits of all steps would be K x rows x vocabulary in fp32 (7.5 GB for MiMo at 4096 tokens). lm_head is frozen,
so the only gradient that must survive a chunk is the one of its hidden states: each chunk's logits give the loss,
the match and that gradient at once, and are dropped.

With p the frozen model's own next-token distribution at the position a step predicts, and q the step's:

    ce        -log q(x), x the text's token                                    paper Eq. 1
    kl        KL(p || q) = sum p (log p - log q)                               Hinton et al. 2015
    topk_kl   KL(p' || q), p' = p cut to its top_k tokens and renormalised: what a server samples from with top_k
    tv        TV(p, q) = 1 - a, a = sum min(p, q)                              a: acceptance of speculative sampling,
                                                                               Leviathan et al. 2023, Theorem 3.5
    lk        w KL + (1 - w) TV, w = exp(-eta a), per row, no gradient in w    LK losses, arXiv 2602.23881
    e2e       mean over k of 1 - a_1 .. a_k: drafts not accepted, of K         Bebop, arXiv 2606.12370

p needs no second model: it is the same lm_head on the backbone's hidden state k rows further on, which step 1 of
another row reads anyway. One projection of it serves the K rows that predict that position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import SOFT_LOSSES, FastMTPConfig
from .frozen_head import FrozenHeadLoss, chunk_size, even, project


class StepLosses(NamedTuple):
    """Per-row results, [K, N]; rows that are not valid hold 0 and False."""

    loss: Tensor
    """at least fp32, differentiable."""
    match: Tensor
    """bool: the head's argmax is the target."""
    overlap: Tensor | None
    """sum min(p, q): probability that sampled drafts are accepted here. None for `ce`, which has no p."""


def step_losses(
    outputs_KND: Tensor,
    weight_VD: Tensor,
    targets_KN: Tensor,
    valid_KN: Tensor,
    config: FastMTPConfig,
    hidden_RD: Tensor | None = None,
    rows_N: Tensor | None = None,
) -> StepLosses:
    """Loss and match of every step, unweighted and unreduced.

    Args:
        outputs_KND: g^1..g^K of N rows.
        weight_VD: frozen output matrix, or the part of it in a token map.
        targets_KN: row of `weight` each step should predict.
        valid_KN: bool; other rows are never projected.
        config: loss, temperature, top_k, lk_eta and loss_chunk_size count.
        hidden_RD, rows_N: the backbone's hidden states, flat, and which of them the N rows are: `hidden[rows + k]`
            projects to p of step k. Only the soft losses need them.

    With `e2e`, step k holds 1 - a_1 .. a_k, so that the mean over steps is the loss.
    """
    soft = config.loss in SOFT_LOSSES
    teacher = (hidden_RD, rows_N) if soft else (None, None)
    loss, match, overlap = FrozenHeadLoss.apply(  # type: ignore[no-untyped-call]
        outputs_KND, weight_VD, targets_KN, valid_KN, config, *teacher
    )
    if config.loss == "e2e":
        loss = ((1 - torch.where(valid_KN, 1 - loss, 1).cumprod(0)) * valid_KN).to(loss.dtype)
    return StepLosses(loss, match, overlap if soft else None)


def weighted_loss(loss_KBT: Tensor, step_weights: list[float], num_items: Tensor | int) -> Tensor:
    """sum_k alpha_k sum(loss_k) / num_items (paper Eq. 1).

    `num_items` is the trainer's global count of supervised tokens, the same for every step, so that gradient
    accumulation and data parallelism give exactly the loss of one large batch.
    """
    weights = torch.tensor(step_weights, dtype=loss_KBT.dtype, device=loss_KBT.device)
    return (loss_KBT.flatten(1).sum(1) * weights).sum() / torch.as_tensor(num_items, device=loss_KBT.device).clamp(
        min=1
    )


@torch.no_grad()
def drafts(rows_ND: Tensor, weight_VD: Tensor, config: FastMTPConfig) -> Tensor:
    """argmax of the logits of every row, [N], a chunk of rows at a time."""
    best = [project(part, weight_VD).argmax(-1) for part in even(rows_ND, chunk_size(weight_VD, config))]
    return torch.cat(best) if best else torch.empty(0, dtype=torch.long, device=rows_ND.device)
