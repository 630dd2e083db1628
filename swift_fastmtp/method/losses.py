"""Eq. 1 of the paper, and the other losses of the draft steps, as their formulas on all logits at once.

These are the definitions: `chunked_losses.py`, which training runs, gives the same values in constant memory, and the
tests hold it to these.

With p the frozen model's own next-token distribution at the position a step predicts, and q the step's:

    ce        -log q(x), x the text's token                                    paper Eq. 1
    kl        KL(p || q) = sum p (log p - log q)                               Hinton et al. 2015
    lk        w KL + (1 - w) (1 - a), w = exp(-eta a), no gradient in w        LK losses, arXiv 2602.23881
              a = sum min(p, q): acceptance of speculative sampling            Leviathan et al. 2023, Theorem 3.5

p needs no second model: it is the same lm_head on the backbone's hidden state k rows further on, which step 1 of
another row reads anyway. One projection of it serves the K rows that predict that position.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .config import SOFT_LOSSES, FastMTPConfig


def fastmtp_loss(
    logits_KNV: Tensor,
    targets_KN: Tensor,
    valid_KN: Tensor,
    step_weights: list[float],
    num_items: Tensor | int,
) -> Tensor:
    """Eq. 1: the cross-entropy of every draft step against the text, weighted by Eq. 2's alpha_k.

    Args:
        logits_KNV: of draft step k at base row i, which predict x_{i+k+1}.
        targets_KN: those tokens.
        valid_KN: bool, whether there is such a token, and it is supervised.
        step_weights: alpha_1..alpha_K (`FastMTPConfig.step_weights`).
        num_items: supervised tokens of the batch.
    """
    return weighted_loss(cross_entropy(logits_KNV, targets_KN) * valid_KN, step_weights, num_items)


def cross_entropy(logits_KNV: Tensor, targets_KN: Tensor) -> Tensor:
    """-log q(x) of every row, [K, N]."""
    log_q_KNV = logits_KNV.log_softmax(-1)
    return -log_q_KNV.gather(-1, targets_KN[..., None]).squeeze(-1)


def weighted_loss(loss_KBT: Tensor, step_weights: list[float], num_items: Tensor | int) -> Tensor:
    """sum_k alpha_k sum(loss_k) / num_items (paper Eq. 1).

    `num_items` is the trainer's global count of supervised tokens, the same for every step, so that gradient
    accumulation and data parallelism give exactly the loss of one large batch.
    """
    weights_K = torch.tensor(step_weights, dtype=loss_KBT.dtype, device=loss_KBT.device)
    sums_K = loss_KBT.flatten(1).sum(1)
    count = torch.as_tensor(num_items, device=loss_KBT.device).clamp(min=1)
    return (sums_K * weights_K).sum() / count


class StepLosses(NamedTuple):
    """Per-row results, [K, N]; rows that are not valid hold 0 and False."""

    loss: Tensor
    """at least fp32, differentiable."""
    match: Tensor
    """bool: the head's argmax is the target."""
    accept_prob: Tensor | None
    """sum min(p, q): probability that sampled drafts are accepted here. None for `ce`, which has no p."""


def plain_step_losses(
    outputs_KND: Tensor,
    weight_VD: Tensor,
    targets_KN: Tensor,
    valid_KN: Tensor,
    config: FastMTPConfig,
    hidden_RD: Tensor | None = None,
    rows_N: Tensor | None = None,
) -> StepLosses:
    """Every loss by its formula, and autograd; unweighted and unreduced. Args as `chunked_losses.step_losses`."""
    logits_KNV = outputs_KND @ weight_VD.T
    match_KN = (logits_KNV.argmax(-1) == targets_KN) & valid_KN
    if config.loss not in SOFT_LOSSES:
        return StepLosses(cross_entropy(logits_KNV, targets_KN) * valid_KN, match_KN, None)
    assert hidden_RD is not None and rows_N is not None
    losses, accept_probs = [], []
    for k, logits_NV in enumerate(logits_KNV, start=1):
        # Rows without a position k further on are not valid; any teacher does for them.
        teacher_N = (rows_N + k).clamp(max=len(hidden_RD) - 1)
        p_NV = (hidden_RD[teacher_N] @ weight_VD.T / config.temperature).softmax(-1)
        log_q_NV = (logits_NV / config.temperature).log_softmax(-1)
        loss_N, accept_prob_N = soft_loss(p_NV, log_q_NV, config)
        losses.append(loss_N)
        accept_probs.append(accept_prob_N)
    return StepLosses(torch.stack(losses) * valid_KN, match_KN, torch.stack(accept_probs) * valid_KN)


def soft_loss(p_NV: Tensor, log_q_NV: Tensor, config: FastMTPConfig) -> tuple[Tensor, Tensor]:
    """A loss of one step against the model's own distribution, and the acceptance a = sum min(p, q); both [N]."""
    kl_N = (torch.special.xlogy(p_NV, p_NV) - p_NV * log_q_NV).sum(-1)
    accept_prob_N = torch.minimum(p_NV, log_q_NV.exp()).sum(-1)
    if config.loss == "kl":
        return kl_N, accept_prob_N
    w_N = (-config.lk_eta * accept_prob_N.detach()).exp()
    return w_N * kl_N + (1 - w_N) * (1 - accept_prob_N), accept_prob_N
