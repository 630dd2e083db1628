"""The losses of `losses.py` through the frozen, shared lm_head: the same values, in constant memory.

The logits of all steps would be K x rows x vocabulary in fp32 (7.5 GB for MiMo at 4096 tokens). lm_head is frozen,
so the only gradient that must survive a chunk is the one of its hidden states: each chunk's logits give the loss,
the match and that gradient at once, and are dropped.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .config import SOFT_LOSSES, FastMTPConfig
from .frozen_head import FrozenHead, chunk_size, chunks, even, project
from .losses import StepLosses


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
        config: loss, temperature, lk_eta and loss_chunk_size count.
        hidden_RD, rows_N: the backbone's hidden states, flat, and which of them the N rows are: `hidden[rows + k]`
            projects to p of step k. Only the soft losses need them.
    """
    soft = config.loss in SOFT_LOSSES
    teacher = (hidden_RD, rows_N) if soft else (None, None)
    loss, match, accept_prob = ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        outputs_KND, weight_VD, targets_KN, valid_KN, config, *teacher
    )
    return StepLosses(loss, match, accept_prob if soft else None)


@torch.no_grad()
def greedy_tokens(rows_ND: Tensor, weight_VD: Tensor, config: FastMTPConfig) -> Tensor:
    """argmax of the logits of every row, [N], a chunk of rows at a time."""
    best = [project(part, weight_VD).argmax(-1) for part in even(rows_ND, chunk_size(weight_VD, config))]
    return torch.cat(best) if best else torch.empty(0, dtype=torch.long, device=rows_ND.device)


class ChunkedLoss(torch.autograd.Function):
    """(outputs [K, N, D], ...) → (loss, match, accept_prob), each [K, N]; gradient for the outputs only."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weight: Tensor,
        targets: Tensor,
        valid: Tensor,
        config: FastMTPConfig,
        hidden: Tensor | None,
        rows: Tensor | None,
    ) -> Any:
        K, N, D = outputs.shape
        flat, grad = outputs.reshape(K * N, D), None
        if ctx.needs_input_grad[0]:
            grad = torch.zeros_like(flat)
        wide = torch.promote_types(outputs.dtype, torch.float32)
        loss, accept_prob = (torch.zeros(K * N, dtype=wide, device=outputs.device) for _ in range(2))
        match = torch.zeros(K * N, dtype=torch.bool, device=outputs.device)
        parts = list(chunks(valid, rows, chunk_size(weight, config)))
        most = max((part.size for part in parts), default=0)
        head = _head_type(weight)(weight, outputs.dtype, most, config)
        for part in parts:
            states, teacher = flat[part.rows], None
            if part.positions is None or hidden is None:
                z = head.project(states)
            else:
                # One product for the drafts of all steps and their teachers.
                P = len(part.positions)
                z_all = head.project(torch.cat([hidden[part.positions], states]))
                teacher, z = head.teacher(z_all[:P]), z_all[P:]
            target = targets.flatten()[part.rows, None]
            loss[part.rows], accept_prob[part.rows], best = head.row_losses(z, target, teacher, part.place)
            match[part.rows] = best == target[:, 0]
            if grad is not None:
                grad[part.rows] = (z.to(weight.dtype) @ weight).to(grad.dtype)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(match, accept_prob)
        return loss.view(K, N), match.view(K, N), accept_prob.view(K, N)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        (grad,) = ctx.saved_tensors
        out = grad.view(*grad_loss.shape, -1) * grad_loss[..., None]
        return out.to(grad.dtype), None, None, None, None, None, None


def _head_type(weight: Tensor) -> type[FrozenHead]:
    """Triton's kernels on a GPU, where Triton is installed; plain PyTorch elsewhere."""
    if weight.is_cuda and find_spec("triton"):
        from .frozen_head_triton import FusedHead

        return FusedHead
    return FrozenHead
