"""Cross-entropy through the frozen, shared lm_head, in chunks of supervised rows.

The logits of all steps would be K x rows x vocabulary in fp32 (7.5 GB for MiMo at 4096 tokens). lm_head is frozen,
so the only gradient that must survive a chunk is the one of its hidden states: each chunk's logits give loss,
match and that gradient at once, and are dropped.
"""

from typing import Any, NamedTuple

import torch


class StepLosses(NamedTuple):
    """Per-row results, [K, B, T]; rows that are not valid hold 0 and False."""

    nll_KBT: torch.Tensor
    """Negative log-likelihood of the target in nats, fp32, differentiable."""
    match_KBT: torch.Tensor
    """bool: the head's argmax is the target."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(rows [N, D], weight [V, D], targets [N]) → (nll [N], match [N]), gradient for the rows only."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> Any:
        need_grad = ctx.needs_input_grad[0]
        out_dtype = torch.promote_types(rows.dtype, torch.float32)
        nll = torch.empty(rows.shape[0], dtype=out_dtype, device=rows.device)
        match = torch.empty(rows.shape[0], dtype=torch.bool, device=rows.device)
        grad = torch.empty_like(rows) if need_grad else None
        for start in range(0, rows.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (rows[part].to(weight.dtype) @ weight.T).to(out_dtype)
            target = targets[part, None]
            match[part] = logits.argmax(-1) == targets[part]
            log_z = logits.logsumexp(-1, keepdim=True)
            nll[part] = (log_z - logits.gather(1, target)).squeeze(1)
            if grad is not None:
                # d nll / d logits = softmax - onehot, written over the logits to keep one [chunk, V] buffer.
                probs = logits.sub_(log_z).exp_()
                probs.scatter_add_(1, target, -torch.ones_like(target, dtype=out_dtype))
                grad[part] = probs.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(match)
        return nll, match

    @staticmethod
    def backward(ctx: Any, grad_nll: torch.Tensor, _match: torch.Tensor) -> Any:
        (grad,) = ctx.saved_tensors
        return (grad * grad_nll[:, None]).to(grad.dtype), None, None, None


def step_losses(
    outputs: list[torch.Tensor],
    lm_head_weight: torch.Tensor,
    targets_KBT: torch.Tensor,
    valid_KBT: torch.Tensor,
    chunk_size: int,
) -> StepLosses:
    """Loss and match of every step (paper Eq. 1, unweighted and unreduced).

    Args:
        outputs: g^1..g^K, each [B, T, D].
        lm_head_weight: frozen output matrix [V, D].
        targets_KBT, valid_KBT: from `rollout.step_targets`; only valid rows are projected.
        chunk_size: rows whose logits exist at once.
    """
    K, B, T = valid_KBT.shape
    rows = torch.cat([g[valid] for g, valid in zip(outputs, valid_KBT, strict=True)])
    nll, match = _ChunkedCrossEntropy.apply(rows, lm_head_weight, targets_KBT[valid_KBT], chunk_size)  # type: ignore[no-untyped-call]
    dense = torch.zeros(K * B * T, dtype=nll.dtype, device=nll.device)
    index = valid_KBT.flatten().nonzero().squeeze(1)
    return StepLosses(
        dense.index_put((index,), nll).view(K, B, T),
        torch.zeros_like(valid_KBT).masked_scatter(valid_KBT, match),
    )


def weighted_loss(nll_KBT: torch.Tensor, step_weights: list[float], num_items: torch.Tensor | int) -> torch.Tensor:
    """sum_k alpha_k sum(nll_k) / num_items (paper Eq. 1).

    `num_items` is the trainer's global count of supervised tokens, the same for every step, so that gradient
    accumulation and data parallelism give exactly the loss of one large batch.
    """
    weights = torch.tensor(step_weights, dtype=nll_KBT.dtype, device=nll_KBT.device)
    return (nll_KBT.sum(dim=(1, 2)) * weights).sum() / torch.as_tensor(num_items, device=nll_KBT.device).clamp(min=1)
