"""Attention of the two rollouts, as one transformers attention function.

The head's block is a stock transformers decoder layer; its config names the function registered here. So
projections, norms, RoPE and grouped heads are transformers' own, and only "who sees whom" is ours:

* `paper`: step k is ordinary causal attention over step-k keys.
* `exact`: query (k, i) sees the step-1 keys (1, j), j ≤ i, and its own chain (m, i), m = 2..k; one softmax over
  both. This is what a server computes: the draft's KV cache holds step-1 entries for committed tokens, and a
  draft chain adds its own (SGLang `eagle_worker_v2.py`; EAGLE-3 calls it training-time test).

In both, rows see only their own document, and where the block has an indexer (`indexer.py`), only the keys it picks.
Where engines pick once for a chain (`index_share_for_mtp_iteration` of config.json: SGLang `eagle_worker_v2.py`), all
its later steps attend to what step 1 picked, which has no key of the chain.

All of it is a flash kernel over the shared keys, which returns its log-sum-exp, and a merge with the few chain keys; no
[T, T] tensor exists, but for the mask of a pick:

    l = logsumexp(l_1, s_2 .. s_k);   o = o_1 e^(l_1 - l) + sum_m e^(s_m - l) v_m

The backward is exact without a differentiable log-sum-exp: a flash backward computes P = e^(s - l) and
dS = P (dP - rowsum(do o)) from what it is given, so called with the merged o and l it returns the gradients of the
shared part of the merged softmax (the fact that ring attention rests on, Liu et al. 2023).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface

from .flash import Documents, flash, flash_backward, per_kv_head, per_query_head
from .indexer import Index, pick

NAME = "fastmtp_rollout"


@dataclass
class RolloutState:
    """What the steps of one rollout share.

    Attributes:
        rollout: `exact` or `paper`.
        documents: who may see whom.
        rows: flat indices into [B * T] of the N rows that steps ≥ 2 of `exact` compute; None is all.
        keys, values: of each step so far (`exact` only): [B, H_kv, T, d] of step 1, [1, H_kv, N, d] of later ones.
        index_keys: those of the indexer, without heads.
        picked: what `indexer.pick` returned last.
    """

    rollout: str
    documents: Documents
    rows: Tensor | None = None
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    index_keys: list[Tensor] = field(default_factory=list)
    picked: tuple[Tensor | None, Tensor | None] = (None, None)


def rollout_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 (the caller's interface)
    *,
    scaling: float,
    rollout: RolloutState,
    indices: Index | None = None,
    **kwargs: Any,  # noqa: ARG001 (the caller's interface)
) -> tuple[Tensor, None]:
    """transformers' attention interface: q [B, H, T, d], k [B, H_kv, T, d], v [B, H_kv, T, d_v] → [B, T, H, d_v].

    From step 2 of `exact` on, the batch is [1, N]: the chosen rows, flat.
    """
    # Under autocast RoPE may leave queries and keys in float32; kernels want one dtype.
    query, key = query.to(value.dtype), key.to(value.dtype)
    # And one width: latent attention has narrower values, whose added zero columns come out as zero columns.
    width = value.shape[-1]
    value = pad(value, (0, max(query.shape[-1] - width, 0)))
    exact = rollout.rollout == "exact"
    follows = exact and bool(rollout.keys)
    rows = rollout.rows if follows else None
    if not (follows and getattr(module.config, "index_share_for_mtp_iteration", False)):
        if exact:
            rollout.keys.append(key)
            rollout.values.append(value)
        if indices is not None:
            rollout.index_keys = [*rollout.index_keys, indices.keys] if exact else [indices.keys]
            rollout.picked = pick(indices, rollout.index_keys, rows, rollout.documents, module.config.index_topk)
    if exact:
        key, value = rollout.keys[0], rollout.values[0]
    chain_keys, chain_values = (torch.stack(x[1:]) if len(x) > 1 else None for x in (rollout.keys, rollout.values))
    out: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, key, value, chain_keys, chain_values, rows, rollout.documents, scaling, *rollout.picked
    )
    return out[..., :width].transpose(1, 2), None


AttentionInterface.register(NAME, rollout_attention)


class _Attention(torch.autograd.Function):
    """softmax over the causal context and the row's own chain, in one.

    query [B, H, T, d], or [1, H, N, d] of the rows `rows`; key and value [B, H_kv, T, d]; chain_keys and chain_values
    [M, B, H_kv, T, d] (or [M, 1, H_kv, N, d]) or None; visible and chain_visible come from `indexer.pick`. Returns the
    shape of the query.
    """

    @staticmethod
    def forward(  # noqa: PLR0913
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chain_keys: Tensor | None,
        chain_values: Tensor | None,
        rows: Tensor | None,
        documents: Documents,
        scale: float,
        visible: Tensor | None = None,
        chain_visible: Tensor | None = None,
    ) -> Tensor:
        out, lse = flash(_scatter(query, key, rows), key, value, documents, scale, visible)
        out, lse = _gather(out, rows), _gather(lse, rows)
        if chain_keys is not None and chain_values is not None:
            scores = _chain_scores(query, chain_keys, scale, chain_visible)
            total = torch.logaddexp(lse, scores.logsumexp(0))
            merged = out * (lse - total).exp()[..., None].to(out.dtype)
            weights = (scores - total).exp().to(out.dtype)
            for weight, v in zip(weights, chain_values, strict=True):
                merged += weight[..., None] * per_query_head(v, query)
            out, lse = merged, total
        ctx.save_for_backward(query, key, value, chain_keys, chain_values, rows, out, lse, visible, chain_visible)
        ctx.documents, ctx.scale = documents, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, chain_keys, chain_values, rows, out, lse, visible, chain_visible = ctx.saved_tensors
        g, q, o, z = (_scatter(x, key, rows) for x in (grad, query, out, lse))
        dq, dk, dv = flash_backward(g, q, key, value, o, z, ctx.documents, ctx.scale, visible)
        dq = _gather(dq, rows)
        if chain_keys is None:
            return dq, dk, dv, *(None,) * 7
        weights = (_chain_scores(query, chain_keys, ctx.scale, chain_visible) - lse).exp()
        delta = _rowsum(grad, out)
        d_keys, d_values = torch.empty_like(chain_keys), torch.empty_like(chain_values)
        for m, weight in enumerate(weights):
            k, v = (per_query_head(x[m], query) for x in (chain_keys, chain_values))
            d_values[m] = per_kv_head(weight[..., None].to(grad.dtype) * grad, chain_values[m])
            d_scores = (weight * (_rowsum(grad, v) - delta) * ctx.scale)[..., None].to(query.dtype)
            dq = dq + d_scores * k
            d_keys[m] = per_kv_head(d_scores * query, chain_keys[m])
        return dq, dk, dv, d_keys, d_values, *(None,) * 5


def _scatter(x: Tensor, like: Tensor, rows: Tensor | None) -> Tensor:
    """[1, H, N, ...] of chosen rows → [B, H, T, ...] with zeros elsewhere.

    A zero query with a zero gradient adds nothing to any gradient, so the kernels need not know of rows.
    """
    if rows is None:
        return x
    (B, _, T, _), H = like.shape, x.shape[1]
    full = x.new_zeros(B * T, H, *x.shape[3:])
    full[rows] = x[0].transpose(0, 1)
    return full.unflatten(0, (B, T)).transpose(1, 2)


def _gather(x: Tensor, rows: Tensor | None) -> Tensor:
    """The inverse of `_scatter`."""
    if rows is None:
        return x
    return x.transpose(1, 2).flatten(0, 1)[rows].transpose(0, 1)[None]


def _chain_scores(query: Tensor, chain_keys: Tensor, scale: float, visible: Tensor | None) -> Tensor:
    """[M, B, H, T], at least float32."""
    scores = torch.stack([_rowsum(query, per_query_head(k, query)) for k in chain_keys]) * scale
    return scores if visible is None else scores.masked_fill(~visible, torch.finfo(scores.dtype).min)


def _rowsum(a: Tensor, b: Tensor) -> Tensor:
    """sum over the last dimension of a * b, accumulated in at least float32."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(-1)
