"""Causal attention within documents that also returns its log-sum-exp, and its backward: one call for every device.

CPU and CUDA run PyTorch's own flash kernels; anything else (float32 on a GPU, value heads narrower than query heads)
runs the same algorithm in plain PyTorch, a block of queries at a time. No tensor of [T, T] exists in any of them.
"""

from itertools import pairwise

import torch
from torch import Tensor

from .compat_torch import CPU_BACKWARD, CPU_FORWARD, CUDA_BACKWARD, CUDA_FORWARD, operator

_BLOCK = 512
_Grads = tuple[Tensor, Tensor, Tensor]


class Documents:
    """Which rows of a batch attend to each other: causal, within runs of equal segment id.

    Args:
        segment_ids_BT: document number of every row; padding is -1.

    Attributes:
        segments: what was given, [B, T].
        longest: rows of the longest document, with the padding behind it where `spans` is None.
        spans: (batch row, start, end) of every run; None where plain causal attention over all T is the same. It is
            when every batch row holds one document with padding at its end only: no real row can see that padding,
            and what padding rows see does not matter.
    """

    def __init__(self, segment_ids_BT: Tensor) -> None:
        real = segment_ids_BT >= 0
        one_document = (segment_ids_BT == segment_ids_BT[:, :1]) | ~real
        padding_last = real[:, :1].all() & (real[:, 1:] <= real[:, :-1]).all()
        self.spans: list[tuple[int, int, int]] | None = None
        self.segments = segment_ids_BT
        self.longest = T = segment_ids_BT.shape[1]
        if bool(one_document.all() & padding_last):
            return
        starts = torch.ones_like(real)
        starts[:, 1:] = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
        edges = [*starts.flatten().nonzero().squeeze(1).tolist(), segment_ids_BT.numel()]
        self.spans = [(a // T, a % T, a % T + b - a) for a, b in pairwise(edges)]
        self.cu_seqlens = torch.tensor(edges, dtype=torch.int32, device=segment_ids_BT.device)
        self.longest = max(end - start for _, start, end in self.spans)


def flash(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """q [B, H, T, d], k [B, H_kv, T, d], v [B, H_kv, T, d_v] → output [B, H, T, d_v], log-sum-exp [B, H, T].

    The log-sum-exp is float32, or float64 for float64 inputs. `visible` [B, T, T], if given, says in place of
    `documents` which keys each query attends to; one without any has a log-sum-exp near the least number there is.
    """
    if visible is not None:
        return _blocked(query, key, value, scale, visible)
    if _cuda_kernel_fits(query, value):
        return _cuda(query, key, value, documents, scale)
    kernel = _cpu if _cpu_kernel_fits(query, value) else _blocked
    if documents.spans is None:
        return kernel(query, key, value, scale)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=_wide(query))
    for b, start, end in documents.spans:
        part = slice(b, b + 1), slice(None), slice(start, end)
        out[part], lse[part] = kernel(query[part], key[part], value[part], scale)
    return out, lse


def flash_backward(  # noqa: PLR0913
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents,
    scale: float,
    visible: Tensor | None = None,
) -> _Grads:
    """Gradients for query, key and value, given the gradient of the output.

    `out` and `lse` may be those of a softmax over more keys than these (see `attention`): then the gradients are
    this part's share.
    """
    if visible is not None:
        return _blocked_backward(grad, query, key, value, out, lse, scale, visible)
    if _cuda_kernel_fits(query, value):
        return _cuda_backward(grad, query, key, value, out, lse, documents, scale)
    kernel = _cpu_backward if _cpu_kernel_fits(query, value) else _blocked_backward
    if documents.spans is None:
        return kernel(grad, query, key, value, out, lse, scale)
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for b, start, end in documents.spans:
        part = slice(b, b + 1), slice(None), slice(start, end)
        g, q, k, v, o, z = (x[part] for x in (grad, query, key, value, out, lse))
        for whole, one in zip(grads, kernel(g, q, k, v, o, z, scale), strict=True):
            whole[part] = one
    return grads


def per_query_head(kv: Tensor, query: Tensor) -> Tensor:
    """[B, H_kv, T, d] → [B, H, T, d]: each key head repeated for its group of query heads."""
    groups = query.shape[1] // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, dim=1)


def per_kv_head(grad: Tensor, kv: Tensor) -> Tensor:
    """The backward of `per_query_head`."""
    return grad if grad.shape[1] == kv.shape[1] else grad.unflatten(1, (kv.shape[1], -1)).sum(2)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _cpu_kernel_fits(query: Tensor, value: Tensor) -> bool:
    return query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


def _cpu(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = operator(CPU_FORWARD)(query, key, value, 0.0, True, scale=scale)
    return out, lse


def _cpu_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> _Grads:
    dq, dk, dv = operator(CPU_BACKWARD)(grad, query, key, value, out, lse, 0.0, True, scale=scale)
    return dq, dk, dv


def _cuda_kernel_fits(query: Tensor, value: Tensor) -> bool:
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.float16, torch.bfloat16)
        and width == value.shape[-1]
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _cuda_layout(documents: Documents, *tensors: Tensor) -> tuple[list[Tensor], Tensor | None, int]:
    """[B, H, T, d] → the kernel's [B, T, H, d], or [B * T, H, d] with the documents' edges."""
    moved = [x.transpose(1, 2) for x in tensors]
    if documents.spans is None:
        return [x.contiguous() for x in moved], None, tensors[0].shape[2]
    return [x.flatten(0, 1) for x in moved], documents.cu_seqlens, documents.longest


def _cuda(query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float) -> tuple[Tensor, Tensor]:
    B, H, T, _ = query.shape
    (q, k, v), edges, longest = _cuda_layout(documents, query, key, value)
    forward = operator(CUDA_FORWARD)
    out, lse, *_ = forward(q, k, v, edges, edges, longest, longest, 0.0, True, False, scale=scale)
    if edges is not None:  # [B * T, H, d] and [H, B * T]
        out, lse = out.unflatten(0, (B, T)), lse.view(H, B, T).transpose(0, 1)
    return out.transpose(1, 2), lse


def _cuda_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    documents: Documents,
    scale: float,
) -> _Grads:
    B, _, T, _ = query.shape
    (g, q, k, v, o), edges, longest = _cuda_layout(documents, grad, query, key, value, out)
    lse = lse.contiguous() if edges is None else lse.transpose(0, 1).flatten(1)
    no_dropout = torch.zeros(2, dtype=torch.uint64, device=query.device)
    grads = operator(CUDA_BACKWARD)(
        g, q, k, v, o, lse, edges, edges, longest, longest, 0.0, True, no_dropout, no_dropout, scale=scale
    )
    if edges is not None:
        grads = [x.unflatten(0, (B, T)) for x in grads]
    dq, dk, dv = (x.transpose(1, 2) for x in grads)
    return dq, dk, dv


def _blocked_scores(query: Tensor, key: Tensor, start: int, end: int, scale: float, visible: Tensor | None) -> Tensor:
    """Scores of queries start..end over keys 0..end, [B, H, end - start, end]; the least number above the diagonal, or
    where `visible` says no (infinity would make NaN of a query that sees none)."""
    scores = (query[:, :, start:end] @ key[:, :, :end].transpose(-1, -2)).to(_wide(query)) * scale
    if visible is None:
        hidden = torch.ones(end - start, end, dtype=torch.bool, device=query.device).triu(start + 1)
    else:
        hidden = ~visible[:, None, start:end, :end]
    return scores.masked_fill(hidden, torch.finfo(scores.dtype).min)


def _blocked(
    query: Tensor, key: Tensor, value: Tensor, scale: float, visible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    T = query.shape[2]
    key, value = per_query_head(key, query), per_query_head(value, query)
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=_wide(query))
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        scores = _blocked_scores(query, key, start, end, scale, visible)
        lse[:, :, start:end] = scores.logsumexp(-1)
        weights = (scores - lse[:, :, start:end, None]).exp()
        out[:, :, start:end] = weights.to(value.dtype) @ value[:, :, :end]
    return out, lse


def _blocked_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    visible: Tensor | None = None,
) -> _Grads:
    T, wide = query.shape[2], _wide(query)
    k, v = per_query_head(key, query), per_query_head(value, query)
    dq = torch.empty_like(query)
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    delta = (grad.to(wide) * out.to(wide)).sum(-1, keepdim=True)
    for start in range(0, T, _BLOCK):
        end = min(start + _BLOCK, T)
        rows = slice(start, end)
        weights = (_blocked_scores(query, k, start, end, scale, visible) - lse[:, :, rows, None]).exp()
        d_weights = (grad[:, :, rows] @ v[:, :, :end].transpose(-1, -2)).to(wide)
        d_scores = (weights * (d_weights - delta[:, :, rows]) * scale).to(query.dtype)
        dq[:, :, rows] = d_scores @ k[:, :, :end]
        dk[:, :, :end] += d_scores.transpose(-1, -2) @ query[:, :, rows]
        dv[:, :, :end] += weights.to(grad.dtype).transpose(-1, -2) @ grad[:, :, rows]
    return dq, per_kv_head(dk, key).to(key.dtype), per_kv_head(dv, value).to(value.dtype)
